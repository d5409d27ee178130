"""FP8 GEMMs against float64 on the same operands, and their scaling against its definition."""

from __future__ import annotations

import pytest
import torch

from megasparse.fp8 import transformer_engine as door
from megasparse.fp8.current import CurrentScaling
from megasparse.fp8.delayed import DelayedScaling, update_by_definition
from megasparse.kernels import (
    is_24,
    mvue24,
    prune24_mask,
    s_ste_scale,
    soft_threshold24,
    transposable24_mask,
)
from megasparse.kernels.float8 import quantize
from megasparse.kernels.packed24 import E4M3
from megasparse.sparsity.autograd.linear import linear
from megasparse.sparsity.gemms import fp8_products
from megasparse.sparsity.gemms.choice import GemmChooser
from megasparse.sparsity.gemms.dense_fp8 import DenseFp8Gemms, OperandQuantizers
from megasparse.sparsity.gemms.packed_fp8 import PackedFp8Gemms
from megasparse.sparsity.probe import Probe
from megasparse.sparsity.projection import Projected
from megasparse.sparsity.recipe import make_recipe
from megasparse.sparsity.shard import ShardSlice
from tests import transformer_engine
from tests.transformer_engine import needs_transformer_engine

N, K = 128, 256
# Two e4m3 roundings, each of relative error 2^-4 / sqrt(12) / 1.5 or so, one of bfloat16.
FP8_ERROR = 0.045


def scaling(device, **settings):
    scales = DelayedScaling(device, **settings)
    slots = OperandQuantizers.of(scales)
    scales.allocate()
    return scales, slots


def operands(device, tokens=150):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, K, generator=generator).to(device).bfloat16()
    w = torch.randn(N, K, generator=generator).to(device).bfloat16()
    dz = (torch.randn(tokens, N, generator=generator) * 1e-5).to(device).bfloat16()
    return x.requires_grad_(), w.requires_grad_(), dz


def error(found, expected):
    expected = expected.double()
    return float((found.double() - expected).norm() / expected.norm())


def gemms_of(name, w, slots, **more):
    recipe = make_recipe(name)
    w = w.detach()
    mask = beta = None
    if recipe.projection == "soft_threshold":
        beta = s_ste_scale(w)
        effective = soft_threshold24(w).double() * beta.double()
    else:
        mask = (transposable24_mask if recipe.transposable else prune24_mask)(w)
        effective = w.double() * mask
    channels = (ShardSlice(0, 0, w.shape[0]),)
    # No search here: any algorithm of the library computes the same.
    chooser = GemmChooser(None) if w.is_cuda else None
    gemms = PackedFp8Gemms(recipe, channels, slots, chooser=chooser, **more)
    gemms.refill(w, Projected(mask, beta))
    return gemms, effective, recipe


def test_output_gradients_are_e4m3_unless_hybrid_is_asked_for(device):
    needs_transformer_engine(device)
    _, w, _ = operands(device)
    for name, kind in (("ste", torch.float8_e5m2), ("fst", E4M3)):  # fst: its GEMM is sparse
        slots = [scaling(device)[1] for _ in range(2)]
        assert gemms_of(name, w, slots[0])[0]._row_dtype == E4M3
        assert gemms_of(name, w, slots[1], hybrid=True)[0]._row_dtype == kind


def dense_gemms(w, slots, hybrid=False):
    gemms = DenseFp8Gemms(slots, hybrid)
    gemms.refill(w.detach(), None)
    return gemms


@pytest.mark.parametrize("tokens", [7, 128, 150])
@pytest.mark.parametrize("hybrid", [False, True])
@pytest.mark.parametrize("name", ["fst", "s_ste", "s_ste_3", "ste"])
def test_three_gemms_of_a_layer(device, name, hybrid, tokens):
    needs_transformer_engine(device)
    x, w, dz = operands(device, tokens)
    _, slots = scaling(device)
    gemms, effective, recipe = gemms_of(name, w, slots, hybrid=hybrid)
    z = linear(x, w, gemms, seed=5)
    z.backward(dz)
    assert z.dtype == x.grad.dtype == w.grad.dtype == torch.bfloat16
    assert error(z.detach(), x.detach().double() @ effective.t()) < FP8_ERROR
    # Two bits of mantissa instead of three in e5m2, where the other operand is dense.
    loose = 1.7 if hybrid and "grad_input" not in recipe.sparse_gemms else 1.0
    if recipe.double_pruned:  # of what is rounded, so that more ties fall to the later row
        lost = error(dz.double() @ gemms._other.dense().double().t(), dz.double() @ effective)
        assert 0.15 < lost < 0.23  # the root of 3.5 % of the squares
        effective = gemms._other.dense().double().t()
        assert is_24(effective.float(), dim=0)
    assert error(x.grad, dz.double() @ effective) < loose * FP8_ERROR
    drawn = dz.double() if recipe.mvue == "off" else mvue24(dz.float(), seed=5, dim=0).double()
    if recipe.mvue != "off":
        loose = 1.0  # drawn in e4m3
    assert error(w.grad, drawn.t() @ x.detach().double()) < loose * FP8_ERROR
    sparse = set(recipe.sparse_gemms)
    assert gemms.ran_sparse == sparse or x.is_cuda  # there a dense one may be faster


@pytest.mark.parametrize("kind", [DelayedScaling, CurrentScaling])
def test_the_scale_of_a_soft_threshold_weight_has_room_for_beta(device, kind):
    """The operand is beta S(W): a scale of W alone would cut it off."""
    needs_transformer_engine(device)
    _, w, _ = operands(device)
    scales = kind(device)
    slots = OperandQuantizers.of(scales)
    scales.allocate()
    gemms = PackedFp8Gemms(make_recipe("s_ste"), (ShardSlice(0, 0, N),), slots)
    for beta in (12.0, 0.1):
        fresh = torch.tensor(beta, device=device)
        gemms.refill(w.detach(), Projected(None, fresh))
        if kind is DelayedScaling and beta < 1:
            scales.finish_step()
            gemms.refill(w.detach(), Projected(None, fresh))
        eye = torch.eye(K, device=device).bfloat16()
        expected = soft_threshold24(w.detach()).double() * beta
        assert error(gemms.output(eye).t(), expected) < FP8_ERROR, beta


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("name", ["fst", "dense"])
def test_a_bias_is_not_scaled(device, name, known):
    """Also where the device corrects what the host assumed of the scales."""
    needs_transformer_engine(device)
    x, w, _ = operands(device)
    scales, slots = scaling(device)
    gemms = dense_gemms(w, slots) if name == "dense" else gemms_of(name, w, slots)[0]
    linear(x, w, gemms)
    scales.finish_step()  # from now on the scale comes first
    scales.host_follows = known
    if not known:
        scales.assumed = [2.0**-3] * len(scales.assumed)
    bias = (torch.arange(N, device=device) - 50.0).bfloat16()
    without = linear(x, w, gemms).detach().double()
    found = linear(x, w, gemms, bias=bias).detach().double()
    assert error(found, without + bias.double()) < 4e-3


@pytest.mark.parametrize("kind", [DelayedScaling, CurrentScaling])
def test_products_assume_the_weights_scale_of_now(device, monkeypatch, kind):
    """Also where a replayed refill has left the object as it was: nothing is left to correct, and
    a weight that has grown gives what it is."""
    needs_transformer_engine(device)
    x, w, dz = operands(device, 128)
    scales = kind(device)
    slots = OperandQuantizers.of(scales)
    scales.allocate()
    gemms, effective, _ = gemms_of("fst", w, slots)
    gemms.grad_input(gemms.prepare_grad_output(dz, 5)), gemms.output(x)
    state = dict(vars(gemms))
    grown = w.detach() * 1024
    mask = transposable24_mask(grown)
    gemms.refill(grown, Projected(mask))
    scales.finish_step()
    gemms.refill(grown, Projected(mask))
    vars(gemms).update(state)  # what a replay changes lies in the tensors
    scales.assume()
    left, rescale = [], fp8_products.rescale_

    def note(z, a, b, applied):
        left.append(float(a * b) / applied)
        return rescale(z, a, b, applied=applied)

    monkeypatch.setattr(fp8_products, "rescale_", note)
    z, dx = gemms.output(x), gemms.grad_input(gemms.prepare_grad_output(dz, 5))
    assert error(z, x.detach().double() @ effective.t() * 1024) < FP8_ERROR
    assert error(dx, dz.double() @ effective * 1024) < FP8_ERROR
    assert left == ([] if kind is DelayedScaling else [1.0, 1.0])


@pytest.mark.parametrize("hybrid", [False, True])
@pytest.mark.parametrize("delayed", [False, True])
def test_dense_gemms(device, hybrid, delayed):
    needs_transformer_engine(device)
    x, w, dz = operands(device)
    slots = scaling(device)[1] if delayed else OperandQuantizers.of(CurrentScaling())
    gemms = dense_gemms(w, slots, hybrid)
    z = linear(x, w, gemms)
    z.backward(dz)
    loose = 1.7 if hybrid else 1.0  # two bits of mantissa instead of three
    assert error(z.detach(), x.detach().double() @ w.detach().double().t()) < FP8_ERROR
    assert error(x.grad, dz.double() @ w.detach().double()) < loose * FP8_ERROR
    assert error(w.grad, dz.double().t() @ x.detach().double()) < loose * FP8_ERROR
    # e5m2 reaches 2^-16 where e4m3 ends at 2^-9: a gradient of a millionth of the largest lives.
    small = torch.cat([dz, dz[:1] * 1e-6])
    gradients = gemms.grad_input(gemms.prepare_grad_output(small, 0))
    assert bool(gradients[-1].any()) == hybrid


def test_what_is_not_trained_leaves_no_trace_in_the_scaling(device):
    needs_transformer_engine(device)
    x, w, dz = operands(device)
    scales, slots = scaling(device)
    gemms, *_ = gemms_of("fst", w, slots)
    z = linear(x, w, gemms, seed=5)
    z.backward(dz)
    before = scales.history.clone()
    with torch.no_grad():
        linear(100 * x, w, gemms)
    assert torch.equal(scales.history, before)
    assert float(before[0, slots.x.index]) == float(x.detach().abs().max())
    assert float(before[0, slots.gradient.index]) == float(dz.abs().max())
    assert float(before[0, slots.draw.index]) == pytest.approx(
        float(mvue24(dz.float(), seed=5, dim=0).abs().max()), rel=1e-6
    )


def test_scales_follow_the_largest_magnitude_of_the_history(device):
    needs_transformer_engine(device)
    scales, slots = scaling(device, history_length=3)
    x = torch.ones(4, 4, device=device)
    slots.x.scale_for(x)
    assert scales.assumed[slots.x.index] == 1 / 256 and float(slots.x.scale) == 256.0
    seen = []
    for size in (2.0, 8.0, 4.0, 1.0, 1.0, 0.0, float("nan"), 1.0):
        slots.x.amax.fill_(size)
        scales.finish_step()
        # 448 / amax, rounded down to a power of two.
        seen.append(256.0 * scales.assumed[slots.x.index])
        assert float(slots.x.scale_inv) == scales.assumed[slots.x.index]
        assert float(slots.x.scale) == 1 / scales.assumed[slots.x.index]
    # The newest and the two before it; a step of zeros or with a NaN says nothing. Half of a
    # magnitude is too little for a larger scale.
    assert seen == [2.0, 8.0, 8.0, 8.0, 8.0, 8.0, 8.0, 1.0]
    assert not scales.history[0].any()


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1, 2, 16])
@pytest.mark.parametrize("algorithm", ["max", "most_recent"])
def test_transformer_engine_updates_by_the_definition(device, algorithm, length):
    needs_transformer_engine(device)
    generator = torch.Generator(device).manual_seed(1)
    history = torch.zeros(length, 7, device=device)
    scale = torch.ones(7, device=device)
    ours = history.clone(), scale.clone()
    for _ in range(20):
        newest = torch.rand(7, generator=generator, device=device).pow(9)
        newest[3] = 0.0
        door.update_delayed(newest.clone(), history, scale, algorithm, 1)
        update_by_definition(newest, *ours, algorithm, 1)
        torch.testing.assert_close(scale, ours[1], rtol=1e-6, atol=0)
        torch.testing.assert_close(history, ours[0], rtol=0, atol=0)


@pytest.mark.gpu
def test_transformer_engine_quantizes_by_the_definition(device):
    needs_transformer_engine(device)
    x, *_ = operands(device, 256)
    _, slots = scaling(device)
    slots.x.scale_for(x.detach() / 2)  # the largest saturate
    rows, columns, _ = slots.x.quantized(x.detach(), columns=True)
    expected = quantize(x.detach(), slots.x.scale, E4M3)
    assert torch.equal(rows.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(columns.view(torch.uint8), expected.view(torch.uint8).t())
    only_columns = slots.x.quantized(x.detach(), rows=False, columns=True)
    assert only_columns[0] is None and torch.equal(
        only_columns[1].view(torch.uint8), columns.view(torch.uint8)
    )


def test_state_goes_through_a_checkpoint(device):
    needs_transformer_engine(device)
    scales, slots = scaling(device, history_length=4)
    for number, slot in enumerate(slots[:3]):  # the draw's is not used
        slot.scale_for(torch.full((2, 2), 2.0**number, device=device))
    for size in (1.0, 7.0, 3.0):
        for slot in slots[:3]:
            slot.amax.fill_(size)
        scales.finish_step()
    state = {name: value.cpu() for name, value in scales.export_state(slots).items()}
    for length in (4, 2, 9):  # also into another length of the history
        other, theirs = scaling(device, history_length=length)
        other.import_state(theirs, state)
        assert other.assumed == scales.assumed
        assert other.initialized == scales.initialized == [True, True, True, False]
        assert torch.equal(other.scale_inv, scales.scale_inv)
        shared = min(length, 4) - 1
        assert torch.equal(other.history[-shared:], scales.history[-shared:])
    other.import_state(theirs, {})  # a checkpoint of a run without FP8


@pytest.mark.parametrize(("recipe", "hybrid"), [("fst", False), ("s_ste", True)])
def test_the_probe_is_told(device, recipe, hybrid):
    """Magnitudes are the operands' own, whatever format and scale."""
    needs_transformer_engine(device)
    x, w, dz = operands(device)
    scales, slots = scaling(device)
    with torch.no_grad():
        w[:, :8] *= 1e-7  # below what e4m3 has beside the largest
    probe = Probe()
    probe.ask()
    gemms, effective, _ = gemms_of(recipe, w, slots, probe=probe, hybrid=hybrid)
    # Not what was pruned.
    rounded = gemms._packed.stored()
    lost = effective.count_nonzero() - rounded.float().count_nonzero()
    assert float(probe.sums["fp8_weight_lost"]) == float(lost) >= w.shape[0]
    assert float(probe.sums["fp8_weight_all"]) == w.numel()
    assert float(probe.maxima["weight"]) == pytest.approx(float(effective.abs().max()), rel=1e-6)
    linear(x, w, gemms, seed=5).backward(2 * dz)
    probe.ask()  # forgets that; the scale is still of the larger one
    linear(x, w, gemms, seed=5).backward(dz)
    assert float(probe.maxima["grad_output"]) == float(dz.abs().max())
    drawn = mvue24(dz.float(), seed=5, dim=0)
    found = float(probe.sums["mvue_after"] / probe.sums["mvue_before"])
    assert found == pytest.approx(float(drawn.square().sum() / dz.float().square().sum()), rel=0.02)


def test_fp8_says_why_it_cannot_run():
    assert "expected a GPU" in door.refusal(torch.device("cpu"))


@pytest.mark.parametrize(
    ("installed", "required", "capability", "outcome"),
    [
        (False, "", (9, 0), pytest.skip.Exception),
        (False, "1", (9, 0), pytest.fail.Exception),
        (False, "1", (8, 0), pytest.skip.Exception),
        (True, "", (9, 0), pytest.fail.Exception),
    ],
)
def test_transformer_engine_is_skipped_only_where_it_may_be_missing(
    monkeypatch, installed, required, capability, outcome
):
    monkeypatch.setenv("MEGASPARSE_REQUIRE_TRANSFORMER_ENGINE", required)
    monkeypatch.setattr(door, "refusal", lambda device: "Transformer Engine cannot be imported (x)")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(
        transformer_engine, "find_spec", lambda name: object() if installed else None
    )
    with pytest.raises(outcome):
        needs_transformer_engine(torch.device("cuda"))
    needs_transformer_engine(torch.device("cpu"))
