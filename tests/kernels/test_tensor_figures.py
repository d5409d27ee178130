"""Figures of whole tensors: both backends against float64, at every size, with odd numbers."""

from __future__ import annotations

import pytest
import torch

from megasparse.errors import KernelError
from megasparse.kernels import add_rounding_figures_, add_square_, tensor_figures
from megasparse.kernels.tensor_figures import triton as fast
from tests.kernels.poison import poison_new_tensors

BACKENDS = ["reference", "triton"]
WIDE = [torch.float32, torch.bfloat16, torch.float16]
NARROW = [torch.float8_e4m3fn, torch.float8_e5m2]
# One entry, a ragged one, more than one of the interpreter's blocks.
SHAPES = [(1,), (7, 13), (131, 1029)]
NAN, INFINITY = float("nan"), float("inf")


def numbers(shape, device, dtype=torch.float32, seed=0):
    """Normal numbers, a fifth of them zero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * 3
    return x.masked_fill(torch.rand(shape, generator=generator) < 0.2, 0.0).to(device, dtype)


def quantized(shape, device, dtype, seed=1):
    """With entries at the limit of the format."""
    most = torch.finfo(dtype).max
    x = numbers(shape, "cpu", seed=seed) * (most / 6)
    return x.clamp(-most, most).to(dtype).to(device)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", WIDE)
def test_figures_are_those_of_all_entries(device, dtype, backend, monkeypatch):
    for shape in SHAPES:
        x = numbers(shape, device, dtype)
        with monkeypatch.context() as patch:
            poison_new_tensors(patch)
            found = tensor_figures(x, backend=backend)
        exact = x.double()
        assert found.nonzeros == (exact != 0).sum() and found.largest == exact.abs().max()
        assert float(found.magnitude) == pytest.approx(float(exact.abs().sum()), rel=1e-5)
        assert float(found.square) == pytest.approx(float(exact.square().sum()), rel=1e-5)
        kinds = [(value.dtype, value.shape) for value in found]
        assert kinds == [(torch.float64, ())] * 3 + [(torch.float32, ())]
    turned = tensor_figures(x.t(), backend=backend)  # a copy is made
    assert turned.nonzeros == found.nonzeros and turned.largest == found.largest


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", WIDE)
def test_odd_numbers_are_never_hidden(device, dtype, backend):
    x = numbers((64, 40), device, dtype)
    count = int((x != 0).sum())
    x[x == 0] = -0.0
    assert tensor_figures(x, backend=backend).nonzeros == count
    for value, check in ((INFINITY, torch.isinf), (NAN, torch.isnan)):
        x[63, 39] = value
        found = tensor_figures(x, backend=backend)
        assert all(check(figure) for figure in found[1:])
        assert found.nonzeros == count + (float(numbers((64, 40), "cpu", dtype)[63, 39]) == 0)


def test_small_and_large_numbers_keep_their_squares(device):
    """Whose squares no float32 has; the definition adds up float32."""
    for size in (1e-44, 1e-30, 1e25):
        x = torch.full((5, 7), size, device=device)
        found = tensor_figures(x, backend="triton")
        assert found.nonzeros == 35
        assert float(found.square) == pytest.approx(35 * float(x[0, 0].double()) ** 2, rel=1e-12)


def test_repeated_figures_have_the_same_bits(device, monkeypatch):
    """With many programs, also in the interpreter."""
    monkeypatch.setattr(fast, "INTERPRETED", fast.Launch(block=256, num_warps=4))
    monkeypatch.setattr(fast, "MAX_PROGRAMS", 24)  # each walks over several blocks
    x = numbers((64, 259), device)
    first, *more = (tensor_figures(x, backend="triton") for _ in range(3))
    assert all(torch.equal(a, b) for again in more for a, b in zip(first, again, strict=True))
    exact = x.double()
    assert first.nonzeros == (exact != 0).sum() and first.largest == exact.abs().max()
    assert float(first.square) == pytest.approx(float(exact.square().sum()), rel=1e-12)
    q, total = quantized((64, 259), device, NARROW[0]), torch.zeros((), device=device).double()
    add_square_(total, q, backend="triton")
    assert float(total) == pytest.approx(float(q.double().square().sum()), rel=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [*WIDE, *NARROW])
def test_squares_are_added_with_what_undoes_a_scaling(device, dtype, backend, monkeypatch):
    for shape in SHAPES:
        x = quantized(shape, device, dtype) if dtype in NARROW else numbers(shape, device, dtype)
        exact, total = float(x.double().square().sum()), torch.zeros((), device=device).double()
        expected = 0.0
        for factor in (1.0, 0.3, torch.tensor(2.0**-40), torch.tensor(3.0, dtype=torch.float64)):
            there = factor.to(device) if isinstance(factor, torch.Tensor) else factor
            with monkeypatch.context() as patch:
                poison_new_tensors(patch)
                assert add_square_(total, x, factor=there, backend=backend) is total
            expected += exact * float(factor) ** 2
            assert float(total) == pytest.approx(expected, rel=1e-5)
        assert add_square_(total, x[:0], backend=backend) == total


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of a NaN's square
def test_every_byte_is_decoded(device, dtype, backend, monkeypatch):
    """Of all 256: which are zero, which are at the limit, and their squares."""
    monkeypatch.setattr(fast, "INTERPRETED", fast.Launch(block=256, num_warps=4))
    bits = torch.arange(256, dtype=torch.uint8)
    for byte in bits:
        value = float(byte.view(dtype).float())
        q, total = byte.reshape(1).view(dtype).to(device), torch.zeros((), device=device).double()
        add_square_(total, q, backend=backend)
        expected = torch.tensor(value).double().square()
        assert torch.equal(total.cpu(), expected) or (total.isnan() and expected.isnan())
    sums, largest = torch.zeros(3, device=device).double(), torch.full((), -1.0, device=device)
    values, stored = torch.ones(256, device=device), bits.view(dtype).to(device)
    add_rounding_figures_(sums, largest, values, stored, backend=backend)
    wide = bits.view(dtype).float()
    at_limit = int((wide.abs() >= torch.finfo(dtype).max).sum())
    assert at_limit == (2 if dtype == NARROW[0] else 4)  # e5m2 has infinities
    assert sums.tolist() == [at_limit, 2, 256] and largest == 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("narrow", NARROW)
@pytest.mark.parametrize("dtype", WIDE)
def test_rounding_figures_are_added(device, dtype, narrow, backend, monkeypatch):
    most = torch.finfo(narrow).max
    sums, largest = torch.zeros(3, device=device).double(), torch.full((), -1.0, device=device)
    expected, top = torch.zeros(3).double(), 0.0
    for shape, scale in zip(SHAPES, (most / 20, 1e-5, most), strict=True):
        values = numbers(shape, device, dtype)
        rounded = (values.float() * scale).clamp(-most, most).to(narrow)
        wide = rounded.float().cpu()
        with monkeypatch.context() as patch:
            poison_new_tensors(patch)
            add_rounding_figures_(sums, largest, values, rounded, backend=backend)
        lost = (wide == 0).sum() - (values.cpu() == 0).sum()
        expected += torch.stack([(wide.abs() == most).sum(), lost, torch.tensor(wide.numel())])
        top = max(top, float(values.abs().max()))
        assert torch.equal(sums.cpu(), expected) and float(largest) == top
    assert float(sums[0]) > 0 and float(sums[1]) > 0
    values[0, 0] = NAN
    padded = torch.cat([rounded.view(torch.uint8), torch.zeros(9, 1029, device=device).byte()])
    add_rounding_figures_(sums, largest, values, padded.view(narrow), backend=backend)
    assert largest.isnan()


def test_refusals(device):
    x, total = torch.ones(4, 4, device=device), torch.zeros((), device=device).double()
    q, sums = x.to(NARROW[0]), torch.zeros(3, device=device).double()
    with pytest.raises(KernelError, match="x is torch.float64 of shape"):
        tensor_figures(x.double())
    with pytest.raises(KernelError, match="expected a non-empty tensor of float32, bfloat16"):
        tensor_figures(x[:0])
    with pytest.raises(KernelError, match="total is a torch.float32"):
        add_square_(total.float(), x)
    with pytest.raises(KernelError, match="factor is a torch.int64"):
        add_square_(total, x, factor=torch.tensor(1, device=device))
    with pytest.raises(KernelError, match="rounded is torch.float32"):
        add_rounding_figures_(sums, x[0, 0], x, x)
    with pytest.raises(KernelError, match=r"expected torch.float64 \(3,\)"):
        add_rounding_figures_(sums[:2], x[0, 0], x, q)
    with pytest.raises(KernelError, match="sums has strides"):
        add_rounding_figures_(torch.zeros(6, device=device).double()[::2], x[0, 0], x, q)
    with pytest.raises(KernelError, match="expected one of reference, triton"):
        add_rounding_figures_(sums, x[0, 0], x, q, backend="cusparselt")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", WIDE)
def test_a_large_tensor_on_a_gpu(device, dtype):
    """Both backends at a size with all programs busy; repeated, and in a graph, the same bits."""
    x = numbers((4096, 14336), device, dtype)
    q = (x.float() * 20).clamp(-448, 448).to(NARROW[0])
    exact = [float(f) for f in ((x != 0).sum(), x.double().abs().sum(), x.double().square().sum())]
    results = []
    for backend in (*BACKENDS, "triton"):
        found = tensor_figures(x, backend=backend)
        assert [float(figure) for figure in found[:3]] == pytest.approx(exact, rel=1e-5)
        sums, largest = torch.zeros(3, device=device).double(), torch.full((), -1.0, device=device)
        add_rounding_figures_(sums, largest, x, q, backend=backend)
        results.append([*found, *sums, largest])
        assert largest == found.largest == x.abs().max()
    counts = [(a[0], *a[4:]) for a in results]
    assert counts[0] == counts[1] == counts[2]
    assert all(torch.equal(a, b) for a, b in zip(*results[1:], strict=True))
    total = torch.zeros((), device=device).double()
    add_square_(total, x)  # compiled before the capture
    total.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        add_square_(total, x)
    for _ in range(2):
        graph.replay()
    assert float(total) == 2 * float(results[1][2])
