"""Masked decay touches masked entries only; flips are counted."""

from __future__ import annotations

import pytest
import torch

from megasparse.errors import KernelError
from megasparse.kernels import count_flips, masked_decay_
from tests.kernels.mask_cases import BACKENDS, WIDE, assert_same_bits, poison_empty, weights

# The interpreter says so when infinities meet.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
SHAPES = ((1,), (7,), (4099,), (33, 129), (3, 5, 7), (36, 500), (0, 4))


def random_mask(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("w_dtype", WIDE)
@pytest.mark.parametrize("dtype", WIDE)
def test_adds_decay_where_masked(
    backend: str, dtype: torch.dtype, w_dtype: torch.dtype, device: torch.device, monkeypatch
) -> None:
    for shape in SHAPES:
        grad = weights("normal", shape, dtype, 1)
        w, mask = weights("normal", shape, w_dtype, 2), random_mask(shape, 3)
        expected = grad.double() + (~mask).double() * 0.37 * w.double()
        actual = grad.clone().to(device)
        with monkeypatch.context() as patch:
            poison_empty(patch)
            result = masked_decay_(actual, w.to(device), mask.to(device), 0.37, backend=backend)
        assert result is actual
        unit = torch.finfo(dtype).eps
        torch.testing.assert_close(actual.double().cpu(), expected, rtol=unit, atol=1e-6)
        assert torch.equal(actual.cpu()[mask], grad[mask])


@pytest.mark.parametrize("w_dtype", WIDE)
@pytest.mark.parametrize("dtype", WIDE)
def test_backends_agree_bit_for_bit(
    dtype: torch.dtype, w_dtype: torch.dtype, device: torch.device
) -> None:
    for kind in ("normal", "ties", "extreme"):
        grad = weights(kind, (132, 508), dtype, 1).to(device)
        w = weights(kind, (132, 508), w_dtype, 2).to(device)
        mask = random_mask((132, 508), 3).to(device)
        results = []
        for backend in BACKENDS:
            results.append(masked_decay_(grad.clone(), w, mask, 1.7, backend=backend))
        nan = torch.isnan(results[0])
        assert torch.equal(nan, torch.isnan(results[1]))
        assert nan.any() == (kind == "extreme")  # inf - inf
        assert_same_bits(*(result.masked_fill(nan, 0.0) for result in results))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", WIDE)
def test_kept_entries_keep_their_bits(
    backend: str, dtype: torch.dtype, device: torch.device
) -> None:
    # Every bit pattern, NaN payloads included, beside weights that must not be touched.
    raw = torch.arange(-(1 << 15), 1 << 15).to(torch.int16)
    grad = raw.view(dtype) if dtype != torch.float32 else (raw.int() * 65537).view(dtype)
    grad = grad.clone().to(device)
    before = grad.clone()
    bad = torch.tensor([float("nan"), float("inf"), float("-inf"), 1.0], device=device)
    w = bad.repeat(grad.numel() // 4)
    masked_decay_(grad, w, torch.ones_like(grad, dtype=torch.bool), 0.1, backend=backend)
    assert_same_bits(grad, before)
    # Masked ones are not protected: the damage shows.
    masked_decay_(grad, w, torch.zeros_like(grad, dtype=torch.bool), 0.1, backend=backend)
    assert torch.isnan(grad[0::4]).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend: str, device: torch.device) -> None:
    grad = weights("normal", (36, 52), torch.float32, 1).to(device)
    w = weights("normal", (36, 52), torch.bfloat16, 2).to(device)
    mask = random_mask((36, 52), 3).to(device)
    expected = masked_decay_(grad.clone(), w, mask, 0.5, backend="reference")
    column_major = grad.t().contiguous().t()
    masked_decay_(column_major, w, mask, 0.5, backend=backend)
    assert torch.equal(column_major, expected)
    assert column_major.stride() == (1, 36)
    wide = torch.full((36, 60), 7.0, device=device)
    window = wide[:, 3:55]
    window.copy_(grad)
    masked_decay_(window, w, mask.t().contiguous().t(), 0.5, backend=backend)
    assert torch.equal(window, expected)
    assert (wide[:, :3] == 7).all() and (wide[:, 55:] == 7).all()
    shard = grad.clone().view(-1)
    part = slice(5, 1001)
    masked_decay_(shard[part], w.view(-1)[part], mask.view(-1)[part], 0.5, backend=backend)
    assert torch.equal(shard[part], expected.view(-1)[part])
    assert torch.equal(shard[:5], grad.view(-1)[:5])
    assert torch.equal(shard[1001:], grad.view(-1)[1001:])


def test_large_tensors_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    grad, w = weights("normal", (37, 411), torch.float32), weights("ties", (37, 411), torch.float32)
    mask = random_mask((37, 411), 4)
    expected = masked_decay_(grad.clone(), w, mask, 0.5, backend="reference")
    monkeypatch.setattr("megasparse.kernels.masked_decay._CHUNK", 64)
    assert torch.equal(masked_decay_(grad.clone(), w, mask, 0.5, backend="reference"), expected)


def test_a_parameter_and_its_gradient(device: torch.device) -> None:
    w = torch.nn.Parameter(torch.ones(4, 4, device=device))
    w.sum().backward()
    assert w.grad is not None
    masked_decay_(w.grad, w, torch.zeros(4, 4, dtype=torch.bool, device=device), 0.5)
    assert (w.grad == 1.5).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_wrong_arguments_are_named(backend: str, device: torch.device) -> None:
    x, mask = torch.ones(4, 4, device=device), torch.ones(4, 4, dtype=torch.bool, device=device)
    for wrong in (mask.int(), mask.to(torch.uint8), mask.float()):
        with pytest.raises(KernelError, match=f"mask is {wrong.dtype}, expected torch.bool"):
            masked_decay_(x, x, wrong, 0.1, backend=backend)
        with pytest.raises(KernelError, match=f"mask_b is {wrong.dtype}"):
            count_flips(mask, wrong, backend=backend)
    with pytest.raises(KernelError, match="w is torch.float64"):
        masked_decay_(x, x.double(), mask, 0.1, backend=backend)
    with pytest.raises(KernelError, match=r"grad of shape \(16,\).*\(4, 4\)"):
        masked_decay_(x.view(-1), x, mask, 0.1, backend=backend)
    with pytest.raises(KernelError, match=r"mask_b of shape \(4, 2\).*\(4, 4\)"):
        count_flips(mask, mask[:, :2], backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_count_flips(backend: str, device: torch.device, monkeypatch) -> None:
    for seed, shape in enumerate((*SHAPES, (3,), (300, 701))):
        a, b = random_mask(shape, seed), random_mask(shape, seed + 100)
        expected = sum(x != y for x, y in zip(a.flatten().tolist(), b.flatten().tolist()))
        with monkeypatch.context() as patch:
            poison_empty(patch)
            flips = count_flips(a.to(device), b.to(device), backend=backend)
        assert flips.dtype == torch.int64 and flips.shape == () and flips.device.type == device.type
        assert flips.item() == expected
    a, b = a.to(device), b.to(device)
    assert count_flips(a, ~a, backend=backend).item() == a.numel()
    assert count_flips(a, a.clone(), backend=backend).item() == 0
    column_major = b.t().contiguous().t()
    assert count_flips(a, column_major, backend=backend).item() == expected
    odd = count_flips(a.view(-1)[1:-1], b.view(-1)[1:-1], backend=backend).item()
    ends = int(a[0, 0] != b[0, 0]) + int(a[-1, -1] != b[-1, -1])
    assert odd == expected - ends
