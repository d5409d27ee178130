"""One pass over the weight equals projecting, rounding and packing it in both orientations."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from megasparse.errors import KernelError, NumericsError
from megasparse.kernels import (
    Packed24,
    pack24,
    prune24_mask,
    soft_threshold24,
    transposable24_mask,
    unpack24,
    weight_pack24,
)
from tests.kernels.poison import poison_new_tensors

BACKENDS = ["reference", "triton"]
E4M3, BF16, FP16, FP32 = torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.float32
CONVERSIONS = [(BF16, BF16), (FP16, FP16), (FP32, BF16), (FP32, FP16)]
CONVERSIONS += [(BF16, E4M3), (FP16, E4M3), (FP32, E4M3)]


def weight(shape, dtype, device, seed=0):
    """Normal, with zeros of both signs and entries so small that they vanish in e4m3."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=generator)
    kind = torch.randint(0, 20, shape, generator=generator)
    w = torch.where(kind == 0, 0.0, w)
    w = torch.where(kind == 1, -0.0, w)
    w = torch.where(kind == 2, w * 1e-5, w)
    return w.to(dtype).to(device)


def bits(t):
    return t.contiguous().view(torch.int16 if t.dtype.itemsize == 2 else torch.int8)


def assert_packed(packed, dense, scale):
    """`packed` is what `pack24` makes of `dense`, byte for byte, with this scale_inv."""
    assert isinstance(packed, Packed24) and packed.shape == tuple(dense.shape)
    expected = pack24(dense, backend="reference")
    assert torch.equal(packed.metadata, expected.metadata)
    assert torch.equal(bits(packed.values), bits(expected.values))
    assert packed.scale.dtype == FP32 and packed.scale.shape == () and packed.scale == scale


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("source", "dtype"), CONVERSIONS)
def test_with_a_mask(device, backend, source, dtype, monkeypatch):
    # Tiles are as wide as the width allows: 384 makes three.
    for shape in [(128, 384)] if dtype == E4M3 else [(64, 64), (192, 128)]:
        w = weight(shape, source, device)
        mask = transposable24_mask(w)
        factor = torch.tensor(300.0 if dtype == E4M3 else 1.0, device=device)
        scale = factor if dtype == E4M3 else None
        pruned = torch.where(mask, w.float(), 0.0)
        converted = (pruned * factor).clamp(-448, 448).to(dtype) if scale else pruned.to(dtype)
        amax = torch.tensor([0.5], device=device)
        arguments = {"dtype": dtype, "scale": scale, "backend": backend}
        with monkeypatch.context() as patch:
            poison_new_tensors(patch)
            packed, other = weight_pack24(w, mask, amax=amax, **arguments)
            alone, nothing = weight_pack24(w, mask, transposed=None, **arguments)
            _, dense = weight_pack24(w, mask, transposed="dense", **arguments)
        assert_packed(packed, converted, factor.reciprocal())
        assert_packed(other, bits(converted).t().contiguous().view(dtype), factor.reciprocal())
        assert_packed(alone, converted, factor.reciprocal())
        assert nothing is None and amax == pruned.abs().max()
        assert dense.shape == shape[::-1] and dense.is_contiguous()
        assert torch.equal(bits(dense), bits(converted).t())
        assert packed.buffer.data_ptr() == packed.values.data_ptr()
        # What both orientations mean, without `pack24`: the pruned weight to half a step.
        error = (unpack24(other).t().float() * (1 if scale else 1.0) - pruned).abs()
        if scale is None:
            assert torch.equal(unpack24(packed), unpack24(other).t())
            assert (error <= pruned.abs() * 2.0**-8 + 2.0**-25).all()
        else:
            inside = pruned.abs() * factor <= 448
            step = pruned.abs() * 2.0**-4 + 2.0**-10 / factor
            assert (error <= step * 1.001)[inside].all() and (~inside).any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("source", "dtype"), CONVERSIONS)
def test_with_the_soft_threshold(device, backend, source, dtype, monkeypatch):
    shape = (128, 384) if dtype == E4M3 else (64, 192)
    w = weight(shape, source, device, seed=1)
    beta = torch.tensor(1.37, device=device)
    effective = soft_threshold24(w, backend="reference").float() * beta
    scale = torch.tensor(100.0, device=device) if dtype == E4M3 else None
    converted = effective.to(dtype)
    if scale is not None:
        converted = (effective * scale).clamp(-448, 448).to(dtype)
    scale_inv = 1.0 if scale is None else scale.reciprocal()
    amax = torch.zeros(1, device=device)
    with monkeypatch.context() as patch:
        poison_new_tensors(patch)
        arguments = {"dtype": dtype, "scale": scale, "transposed": "dense"}
        packed, dense = weight_pack24(
            w, threshold_scale=beta, amax=amax, backend=backend, **arguments
        )
    assert_packed(packed, converted, scale_inv)
    assert torch.equal(bits(dense), bits(converted).t())
    assert amax == effective.abs().max()


def double_pruned(w):
    """Of each four along the columns the best two of all six pairs, the later one of equals."""
    groups = w.float().abs().t().reshape(-1, 4).tolist()
    pairs = list(combinations(range(4), 2))
    best = [max(pairs, key=lambda p: (g[p[0]] + g[p[1]], p[1], p[0])) for g in groups]
    kept = torch.zeros(len(groups), 4, dtype=torch.bool)
    kept[torch.arange(len(groups))[:, None], torch.tensor(best)] = True
    kept = kept.view(w.shape[1], w.shape[0]).t().to(w.device)
    return torch.where(kept, bits(w), 0).view(w.dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(("source", "dtype"), [(BF16, BF16), (FP32, FP16), (BF16, E4M3)])
def test_double_pruned(device, backend, masked, source, dtype, monkeypatch):
    """W~ as it is without, and of it the largest two of each four along N, packed along N.

    Multiples of 1/4 and a coarse format make ties; rows of zeros leave columns less than two.
    """
    shape = (128, 384) if dtype == E4M3 else (64, 192)
    w = weight(shape, FP32, device, seed=2)
    w[:, : shape[1] // 2] = (w[:, : shape[1] // 2] * 4).round() / 4
    w[1:24] = 0
    w[24:28] = 1
    w = w.to(source)
    mask = prune24_mask(w) if masked else None
    beta = None if masked else torch.tensor(1.37, device=device)
    scale = torch.tensor(100.0, device=device) if dtype == E4M3 else None
    arguments = {"threshold_scale": beta, "dtype": dtype, "scale": scale, "backend": backend}
    amax, flag = torch.zeros(1, device=device), torch.zeros(1, device=device, dtype=torch.int32)
    with monkeypatch.context() as patch:
        poison_new_tensors(patch)
        alone, _ = weight_pack24(w, mask, transposed=None, **arguments)
        packed, other = weight_pack24(
            w, mask, transposed="double-pruned", amax=amax, error_flag=flag, **arguments
        )
    assert torch.equal(packed.buffer, alone.buffer) and not flag.any()
    if masked:
        effective = torch.where(mask, w.float(), 0.0)
    else:
        effective = soft_threshold24(w, backend="reference").float() * beta
    converted = effective.to(dtype) if scale is None else (effective * scale).clamp(-448, 448)
    converted = converted.to(dtype)
    expected = double_pruned(converted)
    assert_packed(other, bits(expected).t().contiguous().view(dtype), alone.scale)
    assert other.scale.data_ptr() == packed.scale.data_ptr()
    # Its largest entry is W~'s: the scale fits both.
    assert expected.float().abs().max() == converted.float().abs().max()
    mask = torch.ones(shape, dtype=torch.bool, device=device)
    with pytest.raises(KernelError, match="row 0, columns 0 to 3"):
        arguments["threshold_scale"] = None
        weight_pack24(w, mask, transposed="double-pruned", **arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_double_pruning_a_transposable_weight_changes_nothing(device, backend):
    w = weight((128, 128), FP32, device)
    arguments = {"dtype": BF16, "backend": backend}
    both = weight_pack24(w, transposable24_mask(w), transposed="packed", **arguments)
    again = weight_pack24(w, transposable24_mask(w), transposed="double-pruned", **arguments)
    for found, expected in zip(again, both, strict=True):
        assert torch.equal(found.buffer, expected.buffer)


@pytest.mark.parametrize("backend", BACKENDS)
def test_amax_is_only_raised(device, backend):
    w = weight((64, 64), FP32, device)
    amax = torch.tensor([1e6], device=device)
    weight_pack24(w, prune24_mask(w), dtype=BF16, transposed=None, amax=amax, backend=backend)
    assert amax == 1e6
    amax.zero_()
    weight_pack24(w * 0, prune24_mask(w), dtype=BF16, transposed=None, amax=amax, backend=backend)
    assert amax == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_infinities_and_extreme_numbers(device, backend, dtype):
    w = torch.ones(128, 128, device=device, dtype=dtype)
    w[0, :4] = torch.tensor([float("inf"), -float("inf"), 1.0, 0.0])
    w[64, 64:68] = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal] * 2)
    mask = torch.eye(4, device=device).repeat(32, 32) + torch.eye(4, device=device).flip(0).repeat(
        32, 32
    )
    mask = mask.bool()
    one = torch.ones((), device=device)
    packed, other = weight_pack24(w, mask, dtype=E4M3, scale=one, backend=backend)
    converted = torch.where(mask, w.float(), 0.0).clamp(-448, 448).to(E4M3)
    assert_packed(packed, converted, 1.0)
    assert_packed(other, bits(converted).t().contiguous().view(E4M3), 1.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_that_are_not_contiguous(device, backend):
    w = weight((128, 256), BF16, device)
    mask = prune24_mask(w)
    expected = weight_pack24(w, mask, transposed=None, backend=backend)[0].buffer
    wide = torch.cat([w, w], 1)[:, :256]
    shifted = torch.cat([mask[:, :1], mask], 1)[:, 1:]
    other = mask.t().contiguous().t()
    for w_view, mask_view in ((wide, shifted), (w.t().contiguous().t(), other)):
        packed, _ = weight_pack24(w_view, mask_view, transposed=None, backend=backend)
        assert torch.equal(packed.buffer, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("transposed", ["packed", None])
def test_a_mask_that_is_not_24(device, backend, transposed):
    """The error names the place; with a flag, CUDA does not raise."""
    w = torch.ones(128, 128, device=device)
    mask = torch.tensor([1, 1, 0, 0], device=device).bool().repeat(128, 32)
    mask[2::4], mask[3::4] = ~mask[2::4], ~mask[3::4]
    flag = torch.zeros(1, dtype=torch.int32, device=device)
    scale = torch.ones((), device=device)
    arguments = {"dtype": E4M3, "scale": scale, "transposed": transposed, "backend": backend}
    weight_pack24(w, mask, error_flag=flag, **arguments)
    assert flag.item() == 0
    if transposed == "packed":  # along the rows of w still 2:4
        mask[70, 40:44] = ~mask[70, 40:44]
        match = "column 40, rows 68 to 71"
    else:
        mask[70, 40] = True
        match = "row 70, columns 40 to 43"
    with pytest.raises(KernelError, match=match):
        weight_pack24(w, mask, **arguments)
    if w.is_cuda:
        weight_pack24(w, mask, error_flag=flag, **arguments)
        assert flag.item() == 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "column"), [(FP32, 2), (BF16, 63), (FP16, 0)])
def test_a_nan_is_an_error_kept_or_not(device, backend, dtype, column):
    w = torch.ones(64, 64, device=device, dtype=dtype)
    w[37, column] = float("nan")
    mask = torch.tensor([1, 1, 0, 0], device=device).bool().repeat(64, 16)
    beta = torch.ones((), device=device)
    for arguments in ({"mask": mask}, {"mask": ~mask}, {"threshold_scale": beta}):
        arguments |= {"transposed": None, "backend": backend}
        arguments["dtype"] = BF16 if dtype == FP32 else dtype
        with pytest.raises(NumericsError, match=rf"\(64, 64\), first at \(37, {column}\)"):
            weight_pack24(w, **arguments)
        if backend == "triton" or w.is_cuda:
            flag = torch.zeros(1, dtype=torch.int32, device=device)
            weight_pack24(w, nan_flag=flag, **arguments)
            assert flag.item() == 1
            flag.zero_()
            weight_pack24(torch.ones_like(w), nan_flag=flag, **arguments)
            assert flag.item() == 0


def poisoned(operands):
    """All of their memory NaN, or ones where bytes are no numbers."""
    packed, other = operands
    packed.scale.fill_(float("nan"))
    for part in (packed, other):
        if part is not None:
            memory = part.buffer if isinstance(part, Packed24) else part.view(torch.uint8)
            memory.fill_(255)
    return operands


def memory(operands):
    """Addresses of all parts."""
    parts = [operands[0].scale]
    for part in operands:
        if isinstance(part, Packed24):
            parts += [part.values, part.metadata, part.buffer, part.scale]
        elif part is not None:
            parts.append(part)
    return [part.data_ptr() for part in parts]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("transposed", ["packed", "double-pruned", "dense", None])
@pytest.mark.parametrize("dtype", [BF16, E4M3])
def test_operands_of_an_earlier_step_are_filled_in_place(device, backend, transposed, dtype):
    def operands(seed, out=None):
        w = weight((128, 256), FP32, device, seed)
        scale = torch.tensor(30.0 + seed, device=device) if dtype == E4M3 else None
        arguments = {"dtype": dtype, "scale": scale, "transposed": transposed}
        return weight_pack24(w, transposable24_mask(w), out=out, backend=backend, **arguments)

    out = operands(1)
    before, expected = memory(out), operands(2)
    result = operands(2, poisoned(out))
    assert result is out and memory(out) == before
    assert result[0].scale == expected[0].scale
    for found, right in zip(result, expected, strict=True):
        if isinstance(found, Packed24):
            assert torch.equal(found.buffer, right.buffer)
        elif found is not None:
            assert torch.equal(bits(found), bits(right))


def test_operands_that_do_not_fit_are_refused(device):
    def operands(shape, out=None, **changes):
        w = weight(shape, BF16, device)
        return weight_pack24(w, transposable24_mask(w), out=out, **changes)

    out = operands((64, 128))
    with pytest.raises(KernelError, match=r"out\[0\] is .* \(64, 128\), expected .* \(128, 64\)"):
        operands((128, 64), out)
    with pytest.raises(KernelError, match="torch.bfloat16 .* expected torch.float16"):
        weight_pack24(torch.ones(64, 128).half(), torch.zeros(64, 128) > 0, out=out)
    with pytest.raises(KernelError, match="out.1. is Packed24, expected .* transposed='dense'"):
        operands((64, 128), out, transposed="dense")
    with pytest.raises(KernelError, match="out.1. is Packed24, expected .* transposed=None"):
        operands((64, 128), out, transposed=None)
    dense = operands((64, 128), transposed="dense")
    with pytest.raises(KernelError, match=r"out\[1\] is .* \(64, 128\).* \(128, 64\)"):
        operands((64, 128), (dense[0], dense[1].view(64, 128)), transposed="dense")
    with pytest.raises(KernelError, match="two scales"):
        operands((64, 128), (out[0], operands((64, 128))[1]))
    apart = Packed24(
        out[0].values.clone(), out[0].metadata, out[0].shape, out[0].dtype, out[0].scale
    )
    with pytest.raises(KernelError, match="lies in pieces"):
        operands((64, 128), (apart, out[1]))


ONE = torch.ones(())


@pytest.mark.parametrize(
    ("shape", "source", "changes", "match"),
    [
        ((96, 64), BF16, {}, "multiples of"),
        ((64, 96), BF16, {}, "multiples of"),
        ((64, 128), BF16, {"dtype": E4M3, "scale": ONE}, r"\(128, 128\)"),
        ((128, 64), BF16, {"dtype": E4M3, "scale": ONE, "transposed": None}, r"\(64, 128\)"),
        ((0, 64), BF16, {}, "multiples of"),
        ((64, 64), BF16, {"dtype": FP16}, "wider"),
        ((64, 64), FP32, {}, "dtype is torch.float32"),
        ((64, 64), BF16, {"transposed": "both"}, "transposed='both'"),
        ((64, 64), BF16, {"mask": None}, "transposed='packed' without a mask"),
        ((64, 128), BF16, {"dtype": E4M3, "scale": ONE, "transposed": "double-pruned"}, "128, 128"),
        ((64, 64), BF16, {"mask": None, "transposed": None}, "threshold_scale is missing"),
        ((64, 64), BF16, {"threshold_scale": ONE}, "threshold_scale is given"),
        ((64, 64), BF16, {"scale": ONE}, "scale is given"),
        ((128, 128), BF16, {"dtype": E4M3}, "scale is missing"),
        ((128, 128), BF16, {"dtype": E4M3, "scale": ONE.view(1)}, r"scale is .* \(1,\)"),
        ((64, 64), BF16, {"mask": torch.ones(64, 32, dtype=torch.bool)}, "mask is"),
        ((64, 64), BF16, {"mask": torch.ones(64, 64)}, "mask is a torch.float32"),
        ((64, 64), BF16, {"amax": ONE}, "amax"),
        ((64, 64), BF16, {"error_flag": ONE}, "error_flag"),
    ],
)
def test_refusals(shape, source, changes, match):
    w = torch.zeros(shape, dtype=source)
    arguments = {"mask": torch.zeros(shape, dtype=torch.bool)} | changes
    with pytest.raises(KernelError, match=match):
        weight_pack24(w, **arguments)


@pytest.mark.gpu
@pytest.mark.parametrize(("source", "dtype"), CONVERSIONS)
def test_a_large_weight_on_a_gpu(device, source, dtype):
    w = weight((1408, 4224), source, device)
    scale = torch.tensor(50.0, device=device) if dtype == E4M3 else None
    for transposed in ("packed", "double-pruned", "dense"):
        mask = transposable24_mask(w) if transposed == "packed" else prune24_mask(w)
        results = [
            weight_pack24(w, mask, dtype=dtype, scale=scale, transposed=transposed, backend=backend)
            for backend in BACKENDS
        ]
        for fast, slow in zip(*results):
            pair = [x.buffer if isinstance(x, Packed24) else bits(x) for x in (fast, slow)]
            assert torch.equal(*pair)
