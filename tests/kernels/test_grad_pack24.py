"""One pass over the gradient equals quantizing it, and pruning, quantizing and packing it."""

from __future__ import annotations

import math

import pytest
import torch

from megasparse.errors import KernelError
from megasparse.kernels import grad_pack24, is_24, mvue24, pack24, unpack24
from tests.kernels.poison import poison_new_tensors

BACKENDS = ["reference", "triton"]
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
BF16, FP16 = torch.bfloat16, torch.float16
MAXIMUM = {E4M3: 448.0, E5M2: 57344.0}


def gradient(tokens, width, device, dtype=BF16):
    generator = torch.Generator().manual_seed(tokens + width)
    dz = torch.randn(tokens, width, generator=generator)
    dz = dz * torch.randn(tokens, width, generator=generator).exp()  # long tails
    return torch.where(dz.abs() < 0.05, 0.0, dz).to(dtype).to(device)


def scalar(x, device):
    return torch.tensor(float(x), device=device)


def quantized(x, scale, dtype):
    return (x.float() * scale).clamp(-MAXIMUM[dtype], MAXIMUM[dtype]).to(dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("exact", [True, False])
def test_runs_of_tokens_draw_the_numbers_of_their_place(device, backend, exact):
    whole = gradient(512, 64, device, BF16)
    scale = scalar(100.0, device)
    arguments = {"seed": 4, "row_dtype": None, "packed_scale": scale, "exact": exact}
    _, drawn = grad_pack24(whole, backend=backend, **arguments)
    here = torch.cat([whole[64:128], whole[448:]])
    _, packed = grad_pack24(here, tokens=((0, 64), (64, 448)), backend=backend, **arguments)
    expected = unpack24(drawn)
    expected = torch.cat([expected[:, 64:128], expected[:, 448:]], 1)
    assert torch.equal(unpack24(packed), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("row_dtype", [E5M2, E4M3, None])
@pytest.mark.parametrize(
    ("tokens", "width", "dtype"), [(128, 64, BF16), (640, 192, FP16), (131, 128, BF16)]
)
def test_equals_the_operations_it_fuses(
    device, backend, row_dtype, tokens, width, dtype, monkeypatch
):
    dz = gradient(tokens, width, device, dtype)
    # Of both formats numbers saturate, and others fall among the subnormal ones.
    row_scale = None if row_dtype is None else scalar(MAXIMUM[row_dtype] / 2, device)
    packed_scale = scalar(100.0, device)
    row_amax, packed_amax = torch.zeros(1, device=device), torch.zeros(1, device=device)
    sums = torch.zeros(width, device=device)
    pruned = mvue24(dz.float(), seed=9, dim=0, backend="reference")
    expected = torch.zeros(width, -(-tokens // 128) * 128, device=device)
    expected[:, :tokens] = pruned.t()
    expected = quantized(expected, packed_scale, E4M3)
    with monkeypatch.context() as patch:
        poison_new_tensors(patch)
        row, packed = grad_pack24(
            dz,
            seed=9,
            row_scale=row_scale,
            row_dtype=row_dtype,
            packed_scale=packed_scale,
            row_amax=row_amax,
            packed_amax=packed_amax,
            sums=sums,
            backend=backend,
        )
    torch.testing.assert_close(sums.double(), dz.double().sum(0), rtol=1e-5, atol=1e-4)
    if row_dtype is None:
        assert row is None
    else:
        assert row.dtype == row_dtype and row.is_contiguous()
        bits = quantized(dz, row_scale, row_dtype).view(torch.int8)
        assert torch.equal(row.view(torch.int8), bits)
        assert row.float().abs().max() == MAXIMUM[row_dtype]
    library = pack24(expected, backend="reference")
    assert packed.shape == tuple(expected.shape) and packed.dtype == E4M3
    assert packed.scale == packed_scale.reciprocal()
    assert torch.equal(packed.metadata, library.metadata)
    assert torch.equal(packed.values.view(torch.int8), library.values.view(torch.int8))
    assert is_24(unpack24(packed))
    assert row_amax == dz.float().abs().max() and packed_amax == pruned.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_packed_part_is_unbiased(device, backend):
    """The sum's mean over seeds is that of dz, to five standard errors of draws and roundings."""
    dz = gradient(128, 64, device)
    scale = scalar(2.0, device)  # nothing saturates
    repeats = 100 if backend == "reference" else 12
    total, squares = torch.zeros(64, 128), torch.zeros(64, 128)
    for seed in range(repeats):
        _, packed = grad_pack24(dz, seed=seed, row_dtype=None, packed_scale=scale, backend=backend)
        dense = unpack24(packed).cpu()
        total, squares = total + dense, squares + dense**2
    mean = total.sum() / repeats
    deviation = ((squares / repeats - (total / repeats) ** 2).sum() / repeats).sqrt()
    # e4m3 rounds half up and half down: less than 2^-4 of a magnitude, with random signs.
    rounding = 2.0**-4 * dz.float().square().sum().sqrt().cpu()
    assert (mean - dz.float().sum().cpu()).abs() < 5 * (deviation + rounding)
    assert squares.count_nonzero() > 0.4 * squares.numel()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_approximate_sampler(device, backend):
    """Its magnitudes agree to 1e-6: an e4m3 number may differ by a step where that decides."""
    dz = gradient(256, 64, device)
    scale = scalar(16.0, device)  # its reciprocal is exact
    _, packed = grad_pack24(
        dz, seed=3, row_dtype=None, packed_scale=scale, exact=False, backend=backend
    )
    pruned = mvue24(dz.float(), seed=3, dim=0, exact=False, backend="reference")
    expected = quantized(pruned, scale, E4M3).float().t()
    dense = unpack24(packed) * scale
    assert ((dense - expected).abs() <= expected.abs() / 8).all()
    assert (dense != expected).float().mean() < 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_sections_draw_the_numbers_of_their_place(device, backend):
    dz = gradient(128, 128, device)
    scale, sums = scalar(1.0, device), torch.zeros(128, device=device)
    row, packed = grad_pack24(
        dz,
        seed=4,
        row_scale=scale,
        packed_scale=scale,
        sums=sums,
        backend=backend,
        channels=((0, 64, 64), (64, 640, 64)),
    )
    torch.testing.assert_close(sums.double(), dz.double().sum(0), rtol=1e-5, atol=1e-4)
    parts = [
        mvue24(dz[:, 64 * i : 64 * i + 64].float(), seed=4, dim=0, offsets=(0, place))
        for i, place in enumerate((64, 640))
    ]
    expected = quantized(torch.cat(parts, 1).t(), scale, E4M3).float()
    assert torch.equal(unpack24(packed), expected)
    assert torch.equal(row.float(), quantized(dz, scale, E5M2).float())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_seed_on_the_device_and_a_strided_gradient(device, backend):
    dz = gradient(128, 128, device)
    scale = scalar(3.0, device)
    arguments = {"row_scale": scale, "packed_scale": scale, "backend": backend}
    row, packed = grad_pack24(dz, seed=(7 << 40) + 5, **arguments)
    seed = torch.tensor([(7 << 40) + 5], device=device)
    for view in (torch.cat([dz, dz], 1)[:, :128], dz.t().contiguous().t()):
        again, repacked = grad_pack24(view, seed=seed, **arguments)
        assert torch.equal(again.view(torch.int8), row.view(torch.int8))
        assert torch.equal(repacked.buffer, packed.buffer)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("row_dtype", [E5M2, E4M3])
def test_infinities_and_nan_are_not_hidden(device, backend, row_dtype):
    dz = torch.zeros(128, 64, device=device, dtype=BF16)
    dz[1, 3], dz[2, 5], dz[9, 63] = math.inf, -math.inf, math.nan
    one = scalar(1.0, device)
    row_amax, packed_amax = torch.zeros(1, device=device), torch.zeros(1, device=device)
    flag = torch.zeros(1, dtype=torch.int32, device=device)
    arguments = {"seed": 1, "row_scale": one, "row_dtype": row_dtype, "packed_scale": one}
    arguments |= {"error_flag": flag, "backend": backend}
    row, packed = grad_pack24(dz, row_amax=row_amax, packed_amax=packed_amax, **arguments)
    assert row_amax.isnan() and packed_amax.isnan()
    most = MAXIMUM[row_dtype]
    assert row.float()[1, 3] == most and row.float()[2, 5] == -most and row.float()[9, 63].isnan()
    dense = unpack24(packed)
    assert dense[63].isnan().any() and dense[3, 0:4].abs().max() >= 448
    assert int(dense.isnan().any(1).sum()) <= 3 and int((dense != 0).any(1).sum()) == 3
    # With finite numbers alone, the flag stays down.
    flag.zero_()
    grad_pack24(gradient(128, 64, device), **arguments)
    assert flag.item() == 0


@pytest.mark.parametrize("packed_scale", [1.0, 2.0**-8, 2.0**10])
def test_special_groups(device, packed_scale):
    """All groups of special numbers, those that vanish in e4m3 too: the same bytes but for NaN."""
    numbers = torch.tensor([0.0, -0.0, 1.0, -1.0, 1.5, 2.0**-133, -(2.0**120), math.inf, math.nan])
    groups = torch.cartesian_prod(*[numbers] * 4)
    groups = torch.cat([groups, torch.zeros(104 * 64 - len(groups), 4)]).view(104, 64, 4)
    dz = groups.transpose(1, 2).reshape(416, 64).to(BF16).to(device)
    scale = scalar(packed_scale, device)
    flags = [torch.zeros(1, dtype=torch.int32, device=device) for _ in BACKENDS]
    one, other = (
        grad_pack24(
            dz, seed=6, row_dtype=None, packed_scale=scale, error_flag=flag, backend=backend
        )[1]
        for backend, flag in zip(BACKENDS, flags)
    )
    assert torch.equal(one.metadata, other.metadata)
    nan = one.values.float().isnan()
    assert nan.any() and torch.equal(nan, other.values.float().isnan())
    assert torch.equal(one.values.view(torch.int8)[~nan], other.values.view(torch.int8)[~nan])
    assert not any(flag.item() for flag in flags)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("row_dtype", [E5M2, E4M3])
def test_every_number_of_the_row_format(device, backend, row_dtype):
    """Numbers of the format stay; those halfway between two go to the even one."""
    numbers = torch.arange(256, dtype=torch.uint8).view(row_dtype).float()
    numbers = numbers[numbers.isfinite()].sort().values.unique()
    halfway = (numbers[1:] + numbers[:-1]) / 2
    values = torch.cat([numbers, halfway, torch.tensor([2.0**126, -(2.0**126)])])
    dz = torch.zeros(128, 64).flatten()
    dz[: len(values)] = values
    dz = dz.view(128, 64)
    assert torch.equal(dz.to(BF16).float(), dz)
    one = scalar(1.0, device)
    row, _ = grad_pack24(
        dz.to(device, BF16),
        seed=1,
        row_scale=one,
        row_dtype=row_dtype,
        packed_scale=one,
        backend=backend,
    )
    most = MAXIMUM[row_dtype]
    expected = dz.clamp(-most, most).to(row_dtype)
    assert torch.equal(row.cpu().float(), expected.float())


def refusal(**changes):
    one = torch.ones(())
    dz = changes.pop("dz", torch.zeros(64, 64, dtype=FP16))
    return dz, {"seed": 1, "row_scale": one, "packed_scale": one} | changes


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"dz": torch.zeros(64, 60, dtype=FP16)}, "multiples of 64"),
        ({"dz": torch.zeros(64, 64)}, "expected 16 bits"),
        ({"dz": torch.zeros(0, 64, dtype=FP16)}, "expected 16 bits"),
        ({"row_dtype": FP16}, "row_dtype is torch.float16"),
        ({"row_scale": None}, "row_scale is missing"),
        ({"row_dtype": None}, "row_scale is given"),
        ({"packed_scale": torch.ones(1)}, "packed_scale"),
        ({"row_amax": torch.ones(())}, "row_amax"),
        ({"packed_amax": torch.ones(1).double()}, "packed_amax"),
        ({"error_flag": torch.ones(1)}, "error_flag"),
        ({"channels": ((0, 0, 32), (32, 0, 32))}, "multiples of 64"),
        ({"channels": ((0, 0, 128),)}, "expected all 64"),
        ({"seed": "one"}, "seed"),
        ({"packed_scale": None}, "packed_scale is missing"),
    ],
)
def test_refusals(changes, match):
    dz, arguments = refusal(**changes)
    with pytest.raises(KernelError, match=match):
        grad_pack24(dz, **arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("row_dtype", [E5M2, E4M3, None])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_a_large_gradient_on_a_gpu(device, row_dtype, dtype):
    dz = gradient(5000, 1088, device, dtype) * 1e-3
    packed_scale = scalar(1e5, device)
    row_scale = None if row_dtype is None else scalar(1e6, device)
    results = [
        grad_pack24(
            dz,
            seed=2,
            row_scale=row_scale,
            row_dtype=row_dtype,
            packed_scale=packed_scale,
            backend=backend,
        )
        for backend in BACKENDS
    ]
    assert torch.equal(results[0][1].buffer, results[1][1].buffer)
    if row_dtype is not None:
        assert torch.equal(results[0][0].view(torch.int8), results[1][0].view(torch.int8))
