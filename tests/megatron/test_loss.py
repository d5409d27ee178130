"""Means over the tokens that count."""

from __future__ import annotations

import pytest
import torch

from megasparse.megatron.loss import masked_mean, masked_sum


def test_the_mean_is_over_the_tokens_that_count():
    losses = torch.arange(6.0).reshape(2, 3).requires_grad_()
    mask = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    mean = masked_mean(losses, mask)
    assert mean.dtype == torch.float32 and float(mean) == pytest.approx((0 + 2 + 5) / 3)
    mean.backward()
    assert torch.allclose(losses.grad, mask / 3)


def test_nothing_that_counts_gives_zero():
    assert float(masked_mean(torch.ones(2, 3), torch.zeros(2, 3))) == 0.0


def test_16_bit_losses_are_averaged_in_float32():
    losses = torch.full((1, 4096), 1.0, dtype=torch.bfloat16)
    assert float(masked_mean(losses, torch.ones(1, 4096))) == 1.0


def test_sums_keep_the_type_of_the_losses():
    losses = torch.tensor([[0.1, 0.2, 0.4]]).double()
    for mask in (torch.tensor([[True, False, True]]), torch.tensor([[1.0, 0.0, 1.0]])):
        total, count = masked_sum(losses, mask)
        assert total.dtype == torch.float64 and float(total) == float(losses[0, 0] + losses[0, 2])
        assert int(count) == 2
