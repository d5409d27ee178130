"""A frozen weight in FP8: near the weight, half of 16 bits, and without a backward pass."""

from __future__ import annotations

import pytest
import torch

from megasparse.sparsity.gemms.frozen_fp8 import Fp8StoredGemms


def test_output_is_that_of_the_rounded_weight():
    generator = torch.Generator().manual_seed(0)
    # Rows of very different size: a scale each.
    weight = torch.randn(8, 32, generator=generator) * torch.logspace(-3, 3, 8)[:, None]
    weight[3] = 0.0
    gemms = Fp8StoredGemms(weight)
    found = gemms.output(torch.eye(32)).t()
    # Half a unit in the last of three bits, or of the smallest number of the row's scale.
    smallest = weight.abs().amax(1, keepdim=True) / 448 * 2.0**-10
    assert ((found - weight).abs() <= weight.abs() * 2.0**-4 + smallest * 1.01).all()
    assert not torch.equal(found, weight) and not found[3].any()
    assert gemms.bytes_here == 8 * 32 + 4 * 8
    assert gemms.output(torch.eye(32, dtype=torch.bfloat16)).dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="no backward"):
        gemms.grad_input(gemms.prepare_grad_output(torch.ones(2, 8), 0))
