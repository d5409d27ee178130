"""Gradients added up by the layers themselves: over micro-batches, steps, and scaled operands."""

from __future__ import annotations

import pytest
import torch

from megasparse.fp8.delayed import DelayedScaling
from megasparse.kernels import transposable24_mask
from megasparse.sparsity.autograd.linear import linear
from megasparse.sparsity.gemms.dense import DenseGemms
from megasparse.sparsity.gemms.dense_fp8 import OperandQuantizers
from megasparse.sparsity.gemms.packed_fp8 import PackedFp8Gemms
from megasparse.sparsity.gradient_sum import GradientSum, StepSums
from megasparse.sparsity.projection import Projected
from megasparse.sparsity.recipe import make_recipe
from megasparse.sparsity.shard import ShardSlice

N = K = 128


def _gemms(kind, w):
    if kind == "dense":
        return DenseGemms(w)
    scaling = DelayedScaling(torch.device("cpu"))
    quantizers = OperandQuantizers.of(scaling)
    scaling.allocate()
    gemms = PackedFp8Gemms(
        make_recipe("ste" if kind == "ste" else "fst"), (ShardSlice(0, 0, N),), quantizers
    )
    gemms.refill(w.detach(), Projected(transposable24_mask(w)))
    if kind == "unknown":  # the host assumes other scales than the device has
        linear(torch.ones(96, K).bfloat16(), w, gemms).sum()
        gemms.prepare_grad_output(torch.ones(96, N).bfloat16(), 3)
        scaling.host_follows = False
        scaling.assumed = [2.0**-3] * len(scaling.assumed)
    return gemms


def test_the_sum_is_open_only_when_it_is_said():
    assert not StepSums().open and StepSums().begins is None
    w, x = torch.randn(4, 8, requires_grad=True), torch.randn(6, 8)
    gemms, step = DenseGemms(w), StepSums()
    gemms.total = GradientSum(torch.zeros(4, 8), step)
    assert not gemms.strided and DenseGemms.total is None
    expected = x.sum(0).expand(4, 8)
    linear(x, w, gemms).sum().backward()
    torch.testing.assert_close(w.grad, expected)
    assert not gemms.total.total.any()
    w.grad, step.open = None, True
    for micro_batch in (1, 2):
        linear(x, w, gemms).sum().backward()
        assert w.grad is None
        torch.testing.assert_close(gemms.total.total, micro_batch * expected)
    step.begins = torch.ones(1, dtype=torch.int64)  # a new step
    linear(x, w, gemms).sum().backward()
    torch.testing.assert_close(gemms.total.total, expected)


@pytest.mark.parametrize("kind", ["dense", "ste", "known", "unknown"])
def test_a_sum_is_that_of_the_gradients(kind):
    """To the last of 16 bits, whatever scales its operands have."""
    generator = torch.Generator().manual_seed(0)
    w, x, dz = (torch.randn(s, generator=generator).bfloat16() for s in ((N, K), (96, K), (96, N)))
    gemms = _gemms(kind, w.detach())
    w.requires_grad_()
    linear(x, w, gemms, seed=3).backward(dz)
    expected, w.grad = w.grad.float(), None
    gemms.total = GradientSum(torch.zeros(N, K), StepSums(open=True))
    for _ in range(2):
        linear(x, w, gemms, seed=3).backward(dz)
    error = (gemms.total.total - 2 * expected).norm() / (2 * expected).norm()
    assert w.grad is None and float(error) < 3e-3
