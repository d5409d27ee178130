"""Scales of dense FP8 GEMMs: whose quantizers there are, where scales lie, how they are undone."""

from __future__ import annotations

import pytest
import torch

from megasparse.fp8.current import CurrentScaling
from megasparse.fp8.delayed import DelayedScaling
from megasparse.fp8.scale import Scale
from megasparse.kernels.packed24 import E4M3
from megasparse.sparsity.gemms.dense_fp8 import DenseFp8Gemms, OperandQuantizers, whole_tiles
from megasparse.sparsity.gemms.expert_tokens import ExpertTokens
from megasparse.sparsity.gemms.fp8_experts import DenseFp8ExpertGemms
from megasparse.sparsity.gemms.fp8_products import undone, with_factors
from megasparse.sparsity.probe import Probe
from tests.transformer_engine import needs_transformer_engine


class Asked:
    """A scaling that gives the arguments of each quantizer."""

    def quantizer(self, split, of_experts=False):
        return split, of_experts


def test_each_operand_knows_whether_ranks_split_it():
    plain, split = (False, False), (True, False)
    for dim, x, weight, gradient in (
        (None, plain, plain, plain),
        (0, plain, split, split),  # outputs: dZ too
        (1, split, split, plain),
    ):
        assert OperandQuantizers.of(Asked(), dim) == (x, weight, gradient, gradient)
        experts = OperandQuantizers.of(Asked(), dim, of_experts=True)
        assert experts == (x, (weight[0], True), gradient, gradient)


@pytest.mark.parametrize("kind", [DelayedScaling, CurrentScaling])
def test_operands_of_a_weight_stay_where_they_are(device, kind):
    needs_transformer_engine(device)
    scaling = kind(device)
    quantizers = OperandQuantizers.of(scaling)
    scaling.allocate()
    gemms, places = DenseFp8Gemms(quantizers), []
    for size in (1.0, 8.0, 0.25):
        weight = (size * torch.randn(128, 128, device=device)).bfloat16()
        gemms.refill(weight, None)
        scaling.finish_step()
        gemms.refill(weight, None)
        parts = (gemms._w_NK, gemms._w_KN, gemms._weight.scale, gemms._weight.scale_inv)
        places.append([part.data_ptr() for part in parts])
        found = gemms.output(torch.eye(128, device=device).bfloat16()).t().float()
        assert float((found - weight.float()).norm() / weight.float().norm()) < 0.04
    assert places[0] == places[1] == places[2]


def test_an_input_that_is_saved_is_recorded_and_one_that_is_not_is_not(device):
    """It may have been gathered again: then its output was computed without a record."""
    needs_transformer_engine(device)
    scaling = DelayedScaling(device)
    quantizers = OperandQuantizers.of(scaling)
    scaling.allocate()
    gemms, x = DenseFp8Gemms(quantizers), torch.randn(100, 128, device=device).bfloat16()
    gemms.refill(torch.randn(128, 128, device=device).bfloat16(), None)
    recorded = scaling.history[0]
    gemms.output(x)
    assert float(recorded[quantizers.x.index]) == 0.0
    saved = gemms.save_input(x)
    assert float(recorded[quantizers.x.index]) == float(x.abs().max())
    z, again = gemms.output_and_saved(x)
    assert z.shape == (100, 128) and torch.equal(
        saved[0].view(torch.uint8), again[0].view(torch.uint8)
    )


@pytest.mark.parametrize("experts", [None, 2])
def test_a_probe_is_told_of_weights_and_gradients(device, experts):
    needs_transformer_engine(device)
    scaling, probe = DelayedScaling(device), Probe()
    quantizers = OperandQuantizers.of(scaling)
    scaling.allocate()
    w = torch.randn(128 * (experts or 1), 128, device=device).bfloat16()
    dz = torch.randn(256, 128, device=device).bfloat16()
    if experts is None:
        gemms, more = DenseFp8Gemms(quantizers, probe=probe), (3,)
    else:
        gemms = DenseFp8ExpertGemms(experts, quantizers, probe=probe)
        more = (ExpertTokens([128, 128]), 3)
    assert gemms._row_dtype == E4M3 and not gemms.ran_sparse
    assert experts is None or not gemms._grouped
    for asked in (False, True):
        if asked:
            probe.ask()
        gemms.refill(w, None)
        gemms.prepare_grad_output(dz, *more)
        assert set(probe.maxima) == ({"weight", "grad_output"} if asked else set())
    assert float(probe.maxima["weight"]) == float(w.abs().max())
    assert float(probe.maxima["grad_output"]) == float(dz.abs().max())


def test_whole_tiles():
    assert whole_tiles(torch.ones(1, 2)).shape == (128, 2)
    x = torch.ones(256, 2)
    assert whole_tiles(x) is x and whole_tiles(torch.ones(129, 2))[129:].sum() == 0


@pytest.mark.parametrize("exact", [(True, True), (True, False), (False, True), (False, False)])
def test_what_the_host_assumes_of_scales_is_corrected_where_the_device_knows_better(exact):
    """The factor of the product is the assumed one; a bias is added as it is."""

    def scale(known, assumed, is_exact):
        known = assumed if is_exact else known
        return Scale(torch.tensor(1 / known), torch.tensor(known), assumed, is_exact)

    a, b = scale(0.5, 0.25, exact[0]), scale(4.0, 2.0, exact[1])
    raw, alphas = torch.arange(12.0).view(3, 4), []
    bias = torch.tensor([1.0, -2.0, 3.0, 0.5])

    def product(alpha, bias=None, bias_factors=None):
        alphas.append(alpha)
        z = raw * alpha
        if bias is None:
            return z
        if bias_factors is not None:  # what the correction of the product will undo
            bias = bias * bias_factors[0] * bias_factors[1] / bias_factors[2]
        return z + bias

    expected = raw * float(a.scale_inv * b.scale_inv)
    torch.testing.assert_close(undone(product, a, b), expected)
    torch.testing.assert_close(undone(product, a, b, bias), expected + bias)
    found, factors = with_factors(product, a, b)
    assert alphas == [0.5] * 3 and (factors is None) == all(exact)
    if factors is not None:
        found = found * factors[0] * factors[1] / factors[2]
    torch.testing.assert_close(found, expected)
