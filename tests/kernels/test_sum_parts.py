"""Sums of parts: in float32, in order, rounded once."""

from __future__ import annotations

import pytest
import torch

from megasparse.errors import KernelError
from megasparse.kernels import sum_parts
from tests.kernels.mask_cases import BACKENDS


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_sum_is_rounded_once(device, backend, dtype):
    for count in range(1, 9):
        parts = [torch.randn(3, 683, device=device).to(dtype) for _ in range(count)]
        parts[0][0, :4] = torch.tensor([256.0, -0.0, float("inf"), float("nan")])
        parts[-1][0, :2] = torch.tensor([1.0, -0.0])
        expected = parts[0].double()
        for part in parts[1:]:
            expected = (expected.float() + part.float()).double()
        found = sum_parts(parts, backend=backend)
        assert found.dtype == dtype and found.data_ptr() != parts[0].data_ptr()
        torch.testing.assert_close(found, expected.to(dtype), rtol=0, atol=0, equal_nan=True)
        assert sum_parts(parts, out=parts[-1], backend=backend) is parts[-1]
        assert torch.equal(parts[-1].nan_to_num(), found.nan_to_num())
    assert sum_parts([torch.zeros(0, device=device)], backend=backend).numel() == 0


def test_of_many_small_parts_nothing_is_lost(device):
    """256 + 1 + 1 is 258 in bfloat16, where 256 + 1 is 256."""
    parts = [torch.full((5,), value, dtype=torch.bfloat16, device=device) for value in (256, 1, 1)]
    assert bool((sum_parts(parts) == 258).all())


def test_refusals(device):
    x = torch.zeros(4, 6, device=device)
    for wrong, match in (
        ([], "0 parts"),
        ([x] * 9, "9 parts"),
        ([x.long()], "int64"),
        ([x, x[:2]], r"\(2, 6\)"),
        ([x, x.half()], "float16"),
        ([x, x.t().contiguous().t()], r"strides \(1, 4\)"),
    ):
        with pytest.raises(KernelError, match=match):
            sum_parts(wrong)
