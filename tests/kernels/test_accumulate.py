"""Sums in place of tensors of other dtypes."""

from __future__ import annotations

import pytest
import torch

from megasparse.errors import KernelError
from megasparse.kernels import accumulate_
from tests.kernels.mask_cases import BACKENDS, WIDE, weights


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", WIDE)
def test_sums(backend: str, dtype: torch.dtype, device: torch.device) -> None:
    for shape in ((0,), (1,), (7, 3), (4099,), (2, 3, 1024)):
        for other in WIDE:
            total = weights("normal", shape, dtype, 1).to(device)
            value = weights("normal", shape, other, 2).to(device)
            expected = (total.double() + value.double()).to(dtype)
            result = accumulate_(total, value, backend=backend)
            assert result is total
            torch.testing.assert_close(total, expected, rtol=2e-7, atol=1e-7)
    nan = torch.tensor([1.0, float("nan"), float("inf")], device=device)
    total = accumulate_(torch.ones(3, dtype=dtype, device=device), nan, backend=backend)
    assert torch.isnan(total).tolist() == [False, True, False] and torch.isinf(total[2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_small_parts_are_not_lost(backend: str, device: torch.device) -> None:
    """A part of a flat tensor, to which little is added many times."""
    flat = torch.zeros(3000, device=device)
    part = flat[501:1501].view(10, 100)
    for _ in range(100):
        value = torch.full((100, 10), 2.0**-9, device=device).bfloat16().t()
        accumulate_(part, value, backend=backend)
    part.add_(1)
    assert (part == 1 + 100 * 2.0**-9).all()
    assert not flat[:501].any() and not flat[1501:].any()


def test_wrong_arguments_are_named(device: torch.device) -> None:
    x = torch.ones(4, 4, device=device)
    with pytest.raises(KernelError, match="value is torch.float64"):
        accumulate_(x, x.double())
    with pytest.raises(KernelError, match=r"value of shape \(16,\)"):
        accumulate_(x, x.view(-1))
    with pytest.raises(KernelError, match="contiguous total"):
        accumulate_(x.t()[:2].t(), x[:, :2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_factors_and_beginnings(backend: str, device: torch.device) -> None:
    for dtype in WIDE:
        total = weights("normal", (37, 129), dtype, 1).to(device)
        value = weights("normal", (37, 129), torch.bfloat16, 2).to(device)
        a, b = torch.tensor(2.0**-7, device=device), torch.tensor(2.0**5, device=device)
        expected = (total.double() + value.double() * 2.0**-4).to(dtype)
        accumulate_(total, value, factors=(a, b, 4.0), backend=backend)
        torch.testing.assert_close(total, expected, rtol=2e-7, atol=1e-7)
        for begins in (0, 1):
            before = torch.full_like(total, float("nan")) if begins else total.clone()
            flag = torch.tensor([begins], device=device)
            result = accumulate_(before, value, factors=(a, b, 4.0), begins=flag, backend=backend)
            expected = value.double() * 2.0**-4 + (0 if begins else total.double())
            torch.testing.assert_close(result, expected.to(dtype), rtol=2e-7, atol=1e-7)
    one = torch.ones((), device=device)
    with pytest.raises(KernelError, match="applied is 3.0, expected a power of two"):
        accumulate_(total, value, factors=(one, one, 3.0))
    with pytest.raises(KernelError, match="begins is a torch.float32 tensor"):
        accumulate_(total, value, begins=one)
