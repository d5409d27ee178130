"""The FP8 operands of a dense weight: made once a step, and forgotten with what they were of."""

from __future__ import annotations

import pytest
import torch

from megasparse.fp8.delayed import DelayedScaling
from megasparse.kernels.float8 import E5M2
from megasparse.kernels.packed24 import E4M3
from megasparse.sparsity.dense_weight import DenseFp8Weight
from megasparse.sparsity.gemms.dense_fp8 import OperandQuantizers
from megasparse.sparsity.gradient_sum import GradientSum, StepSums


def made(**more):
    scaling = DelayedScaling(torch.device("cpu"))
    slots = OperandQuantizers.of(scaling)
    scaling.allocate()
    return DenseFp8Weight("w", slots, **more), torch.randn(128, 128).bfloat16()


def test_operands_are_made_once_a_step():
    one, weight = made()
    assert one.ready_for == -1 and one.moves == 0
    refilled, refill = [], one.refill
    one.refill = lambda w: (refilled.append(one.ready_for), refill(w))
    for step in range(3):
        gemms = one.gemms(weight, step)
        assert gemms is one.gemms(weight, step) and one.ready_for == step
        error = gemms.output(torch.eye(128).bfloat16()).t().float() - weight.float()
        assert float(error.norm() / weight.float().norm()) < 0.04
        weight = torch.randn(128, 128).bfloat16()
    assert refilled == [0, 1, 2]
    one.invalidate()
    assert one.ready_for == -1
    one.gemms(weight, 2)
    assert refilled == [0, 1, 2, 2]


def test_a_probe_that_asks_later_has_the_weight_quantized_again():
    one, weight = made()
    one.gemms(weight, 0)
    one.probe.ask()
    one.gemms(weight, 0)
    assert not one.probe.waits and float(one.probe.sums["fp8_weight_all"]) == weight.numel()
    one.gemms(weight, 0)
    assert float(one.probe.sums["fp8_weight_all"]) == weight.numel()  # once
    one.restore()  # what was measured is of no step
    assert one.ready_for == -1 and one.probe.waits
    assert float(one.probe.sums["fp8_weight_all"]) == 0.0
    one.probe.dismiss()
    one.restore()
    assert not one.probe.asked


def test_a_step_tells_its_gemms_where_gradients_are_added_up():
    one, weight = made()
    assert one.total is None
    one.total = GradientSum(torch.zeros(128, 128), StepSums())
    assert one.gemms(weight, 0).total is one.total


@pytest.mark.parametrize("experts", [None, 2])
def test_formats_are_as_asked(experts):
    for more, kind in (({}, E4M3), ({"hybrid": True}, E5M2)):
        one, weight = made(experts=experts, **more)
        gemms = one.gemms(weight, 0)
        assert gemms._row_dtype == kind
        assert experts is None or not gemms._grouped
    if experts:
        assert made(experts=experts, grouped=True)[0]._gemms._grouped


def test_what_a_checkpoint_has_comes_back():
    (one, weight), (other, _) = made(), made()
    one.gemms(weight * 8, 0)
    other.gemms(weight, 0)
    for each in (one, other):
        each.quantizers.x.scaling.finish_step()
    other.import_state(one.export_state())
    assert (other.moves, other.ready_for) == (1, -1)
    for name, value in one.export_state().items():
        assert torch.equal(other.export_state()[name], value), name
