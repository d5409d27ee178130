"""Packed GEMMs of experts against the reference; on a CPU by the packed layout's definition."""

from __future__ import annotations

import pytest
import torch

from megasparse.fp8.current import CurrentScaling
from megasparse.fp8.delayed import DelayedScaling
from megasparse.kernels import (
    mvue24,
    prune24_mask,
    s_ste_scale,
    soft_threshold24,
    transposable24_mask,
    weight_pack24,
)
from megasparse.sparsity.autograd.experts import expert_linear
from megasparse.sparsity.gemms import packed_experts
from megasparse.sparsity.gemms.choice import Choice, GemmChooser
from megasparse.sparsity.gemms.dense_fp8 import DenseFp8Gemms, OperandQuantizers
from megasparse.sparsity.gemms.expert_tokens import Arrivals, ExpertTokens
from megasparse.sparsity.gemms.experts import DenseExpertGemms, ReferenceExpertGemms
from megasparse.sparsity.gemms.fp8_experts import DenseFp8ExpertGemms
from megasparse.sparsity.gemms.packed_experts import PackedExpertGemms, refusal
from megasparse.sparsity.gemms.packed_fp8 import PackedFp8Gemms
from megasparse.sparsity.gemms.packed_fp8_experts import PackedFp8ExpertGemms
from megasparse.sparsity.probe import Probe
from megasparse.sparsity.projection import Projected, effective
from megasparse.sparsity.recipe import make_recipe
from megasparse.sparsity.shard import ShardSlice
from tests.transformer_engine import needs_transformer_engine

E, N, K = 3, 128, 64
COUNTS = [70, 0, 129]
CHANNELS = (ShardSlice(0, 0, N),)


def _close(found: torch.Tensor, expected: torch.Tensor) -> None:
    error = (found.double() - expected.double()).norm() / expected.double().norm()
    assert float(error) < 6e-3, float(error)  # bfloat16 rounding of the results


def _tokens(device: torch.device, tile: int, draws: bool = True) -> ExpertTokens:
    generator = torch.Generator().manual_seed(2)
    places = torch.cat([torch.randperm(400, generator=generator)[:n].sort()[0] for n in COUNTS])
    return Arrivals(COUNTS, places.to(device), 200, 3, 8).in_tiles(tile, draws, device)


def _projected(w: torch.Tensor, recipe) -> Projected:
    search = transposable24_mask if recipe.transposable else prune24_mask
    soft = recipe.projection == "soft_threshold"
    return Projected(
        None if soft else search(w),
        s_ste_scale(w, experts=E) if soft else None,
        *(torch.zeros(1, dtype=torch.int32, device=w.device) for _ in range(2)),
    )


@pytest.mark.parametrize("name", ["ste", "fst", "s_ste", "s_ste_3"])
def test_equal_to_the_reference(device, name):
    torch.manual_seed(1)
    w = torch.randn(E * N, K, device=device).bfloat16()
    recipe = make_recipe(name)
    projected = _projected(w, recipe)
    packed = PackedExpertGemms(E, recipe, CHANNELS, chooser=GemmChooser(None))
    reference = ReferenceExpertGemms(E, recipe, CHANNELS)
    for _ in range(2):  # the second time in place
        packed.refill(w, projected)
    reference.refill(w, projected)
    tokens = _tokens(device, packed.tile)
    x = tokens.rows(torch.randn(sum(COUNTS), K, device=device).bfloat16())
    dz = tokens.rows(torch.randn(sum(COUNTS), N, device=device).bfloat16())
    (z, saved), (expected, kept) = (g.output_and_saved(x, tokens) for g in (packed, reference))
    _close(z, expected)
    ours, theirs = (g.prepare_grad_output(dz, tokens, 7) for g in (packed, reference))
    _close(packed.grad_input(ours), reference.grad_input(theirs))
    found = packed.grad_weight(ours, saved)
    _close(found, reference.grad_weight(theirs, kept))
    assert not found.view(E, N, K)[1].any()
    assert not projected.error_flag.any()
    sparse = {"output"} | ({"grad_weight"} if recipe.mvue != "off" else set())
    assert packed.ran_sparse == sparse | ({"grad_input"} if recipe.packed_transpose else set())


FP8_ERROR = 0.045  # two e4m3 roundings and one of bfloat16 (`test_packed_fp8.py`)


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def _scaled(kind: type, device: torch.device) -> tuple:
    scaling = kind(device) if kind is DelayedScaling else kind()
    quantizers = OperandQuantizers.of(scaling, of_experts=True)
    scaling.allocate()
    return scaling, quantizers


@pytest.mark.parametrize("kind", [DelayedScaling, CurrentScaling])
@pytest.mark.parametrize("hybrid", [False, True])
@pytest.mark.parametrize("name", ["fst", "s_ste", "s_ste_3", "ste", "dense"])
def test_fp8_against_what_they_round(device, name, hybrid, kind):
    """The three GEMMs of every expert on the operands before they are rounded, in float64."""
    needs_transformer_engine(device)
    torch.manual_seed(1)
    w = torch.randn(E * N, 3 * N, device=device).bfloat16()
    w[:N] *= 0.05  # one expert's weights are smaller
    scaling, quantizers = _scaled(kind, device)
    recipe = make_recipe("fst" if name == "dense" else name)
    if name == "dense":
        gemms = DenseFp8ExpertGemms(E, quantizers, hybrid, grouped=True)
        gemms.refill(w, None)
        pruned = again = w.double()
    else:
        chooser = GemmChooser(None) if w.is_cuda else None
        gemms = PackedFp8ExpertGemms(E, recipe, CHANNELS, quantizers, hybrid, chooser=chooser)
        projected = _projected(w, recipe)
        for _ in range(2):  # the second time in place
            gemms.refill(w, projected)
        pruned = again = effective(w, projected).double()
        if recipe.double_pruned:
            again = torch.stack([p.dense().t() for p in gemms._operands[1].each]).double()
            again = again.flatten(0, 1)
    tokens = _tokens(device, gemms.tile, gemms.draws)
    x = torch.randn(sum(COUNTS), 3 * N, device=device).bfloat16()
    dz = (torch.randn(sum(COUNTS), N, device=device) * 1e-5).bfloat16()
    x, dz = tokens.rows(x).requires_grad_(), tokens.rows(dz)
    weight = w.clone().requires_grad_()
    z = expert_linear(x, weight, gemms, tokens, 7)
    z.backward(dz)
    drawn = dz.double()
    if gemms.draws:
        drawn = mvue24(dz.float(), seed=7, dim=0, groups=tokens.groups).double()
    loose = (
        1.7
        if hybrid and "grad_input" not in (recipe.sparse_gemms if name != "dense" else ())
        else 1.0
    )
    loose_sum = 1.0 if gemms.draws else loose
    parts = (t.split(tokens.counts) for t in (x.detach().double(), dz.double(), drawn, z, x.grad))
    for n, (x_e, dz_e, drawn_e, z_e, dx_e) in enumerate(zip(*parts, strict=True)):
        w_e, again_e, dw_e = (t.view(E, N, -1)[n] for t in (pruned, again, weight.grad))
        if not len(x_e):
            assert not dw_e.any()
            continue
        assert _error(z_e, x_e @ w_e.t()) < FP8_ERROR
        assert _error(dx_e, dz_e @ again_e) < loose * FP8_ERROR
        assert _error(dw_e, drawn_e.t() @ x_e) < loose_sum * FP8_ERROR
    assert z.dtype == x.grad.dtype == weight.grad.dtype == torch.bfloat16
    before = scaling.history.clone() if kind is DelayedScaling else None
    with torch.no_grad():
        assert torch.equal(gemms.output(x.detach(), tokens), z)
        gemms.output(2 * x.detach(), tokens)  # of an evaluation: nothing is recorded
    assert before is None or torch.equal(scaling.history, before)
    assert gemms.draws == (name in ("fst", "s_ste", "s_ste_3")) and gemms._grouped
    if name != "dense":
        assert gemms.ran_sparse == set(recipe.sparse_gemms)


@pytest.mark.parametrize("name", ["fst", "s_ste", "dense"])
def test_fp8_of_one_expert_is_that_of_a_linear(device, name):
    """Bit for bit: formats, scales and draws are those of other layers."""
    needs_transformer_engine(device)
    torch.manual_seed(2)
    w = torch.randn(N, 2 * K, device=device).bfloat16()
    x = torch.randn(256, 2 * K, device=device).bfloat16()
    dz = torch.randn(256, N, device=device).bfloat16()
    places = torch.arange(256, device=device)
    tokens = Arrivals([256], places, 256, 0, 1).in_tiles(128, name != "dense", device)
    # A linear's groups have the numbers 0, 1, ...; an expert's those of their first tokens.
    tokens = ExpertTokens(tokens.counts, torch.arange(64, device=device), tokens.spots)
    results = []
    for stacked in (True, False):
        scaling, quantizers = _scaled(DelayedScaling, device)
        more = {"chooser": GemmChooser(None)} if w.is_cuda else {}
        one = (1,) if stacked else ()
        if name == "dense":
            kind = DenseFp8ExpertGemms if stacked else DenseFp8Gemms
            gemms = kind(*one, quantizers)
            gemms.refill(w, None)
        else:
            recipe = make_recipe(name)
            soft = recipe.projection == "soft_threshold"
            beta = s_ste_scale(w).view((1,) if stacked else ()) if soft else None
            kind = PackedFp8ExpertGemms if stacked else PackedFp8Gemms
            gemms = kind(*one, recipe, CHANNELS, quantizers, **more)
            gemms.refill(w, Projected(None if soft else transposable24_mask(w), beta))
        if stacked:
            z, saved = gemms.output_and_saved(x, tokens)
            operands = gemms.prepare_grad_output(dz, tokens, 5)
        else:
            z, saved = gemms.output_and_saved(x)
            operands = gemms.prepare_grad_output(dz, 5)
        dx, dw = gemms.grad_input(operands), gemms.grad_weight(operands, saved)
        results.append((z, dx, dw, scaling.history.clone(), scaling.scale.clone()))
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


def test_fp8_tells_the_probe(device):
    needs_transformer_engine(device)
    w = torch.randn(E * N, 2 * K, device=device).bfloat16()
    probe = Probe()
    probe.ask()
    _, quantizers = _scaled(DelayedScaling, device)
    chooser = GemmChooser(None) if w.is_cuda else None
    recipe = make_recipe("fst")
    gemms = PackedFp8ExpertGemms(E, recipe, CHANNELS, quantizers, probe=probe, chooser=chooser)
    projected = _projected(w, recipe)
    gemms.refill(w, projected)
    tokens = _tokens(device, 128)
    dz = tokens.rows(torch.randn(sum(COUNTS), N, device=device).bfloat16())
    gemms.prepare_grad_output(dz, tokens, 7)
    assert float(probe.maxima["grad_output"]) == float(dz.abs().max())
    assert float(probe.maxima["weight"]) == float((w * projected.mask).abs().max())
    assert float(probe.sums["fp8_weight_all"]) == w.numel()
    drawn = mvue24(dz.float(), seed=7, dim=0, groups=tokens.groups)
    found = float(probe.sums["mvue_after"] / probe.sums["mvue_before"])
    assert found == pytest.approx(float(drawn.square().sum() / dz.float().square().sum()), rel=0.02)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_scale_for_each_stacked_weight(device, backend):
    w = torch.randn(E * 64, 64, device=device).bfloat16()
    beta = torch.tensor([1.0, 0.5, 3.0], device=device)
    packed, _ = weight_pack24(
        w, threshold_scale=beta, transposed=None, dtype=torch.bfloat16, backend=backend
    )
    for n, part in enumerate(packed.dense().split(64)):
        expected = soft_threshold24(w.split(64)[n]).float() * beta[n]
        assert torch.equal(part, expected.bfloat16())


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("dense", [False, True])
def test_choices_are_of_an_experts_shape_and_of_all_rows(device, fp8, dense):
    """What is faster computes it; the weight gradient stays with what was drawn."""
    needs_transformer_engine(device)
    asked = []

    class Chooser:
        def choose(self, key, flops, sparse, by_dense):
            assert _error(sparse(0), by_dense()) < 6e-3
            asked.append((key, flops))
            return Choice(0, 0.0, -1.0) if dense else Choice(0, 0.0, 0.0)

    recipe, w = make_recipe("fst"), torch.randn(E * N, 3 * N, device=device).bfloat16()
    if fp8:
        _, quantizers = _scaled(DelayedScaling, device)
        gemms = PackedFp8ExpertGemms(E, recipe, CHANNELS, quantizers, chooser=Chooser())
    else:
        gemms = PackedExpertGemms(E, recipe, CHANNELS, chooser=Chooser())
    assert gemms._grouped and gemms.ran_sparse == set()
    reference = ReferenceExpertGemms(E, recipe, CHANNELS)
    tokens = _tokens(device, 128)
    for step in (1, 2):
        w = w / step
        projected = _projected(w, recipe)
        gemms.refill(w, projected)
        reference.refill(w, projected)
        x = tokens.rows(torch.randn(sum(COUNTS), 3 * N, device=device).bfloat16())
        dz = tokens.rows(torch.randn(sum(COUNTS), N, device=device).bfloat16())
        z, saved = gemms.output_and_saved(x, tokens)
        ours, theirs = (g.prepare_grad_output(dz, tokens, 7) for g in (gemms, reference))
        bound = 2 * FP8_ERROR if fp8 else 6e-3
        assert _error(z, reference.output(x, tokens)) < bound
        assert _error(gemms.grad_input(ours), reference.grad_input(theirs)) < bound
        assert _error(gemms.grad_weight(ours, saved), reference.grad_weight(theirs, (x,))) < bound
    sparse = {"grad_weight"} if dense else {"output", "grad_input", "grad_weight"}
    assert gemms.ran_sparse == sparse
    assert [flops for _, flops in asked] == [2 * N * 3 * N * len(x)] * 3
    shapes = [f"N {n}, K {k}" for n, k in ((N, 3 * N), (3 * N, N), (N, 3 * N))]
    assert all(shape in key for shape, (key, _) in zip(shapes, asked, strict=True))


def test_the_pruned_weight_is_made_once_a_step(monkeypatch):
    made = []
    compute = packed_experts.effective
    monkeypatch.setattr(packed_experts, "effective", lambda *a: made.append(1) or compute(*a))
    w = torch.randn(E * N, K).bfloat16()
    gemms = PackedExpertGemms(E, make_recipe("ste"), CHANNELS, chooser=GemmChooser(None))
    for step in (1, 2):
        w.mul_(step)
        gemms.refill(w, Projected(prune24_mask(w), None))
        first, second = gemms._weights(), gemms._weights()
        assert len(made) == step and first.data_ptr() == second.data_ptr()
        assert torch.equal(first.reshape(w.shape), w * prune24_mask(w))


def test_refusals():
    weight = torch.zeros(2 * 96, 64)
    assert "an expert's shard is (96, 64)" in refusal(weight, 2, (ShardSlice(0, 0, 96),), None)
    assert refusal(weight, 3, (ShardSlice(0, 0, 64),), "no GPU") == "no GPU"
    assert refusal(weight, 3, (ShardSlice(0, 0, 64),), None) is None
    halves = (ShardSlice(0, 0, 32), ShardSlice(32, 64, 32))
    assert "an expert's shard is (64, 64)" in refusal(weight, 3, halves, None)


@pytest.mark.gpu
def test_grouped_gemms_are_those_one_after_the_other(device):
    w = torch.randn(E * N, K, device=device).bfloat16()
    x = torch.randn(sum(COUNTS), K, device=device).bfloat16()
    dz = torch.randn(sum(COUNTS), N, device=device).bfloat16()
    tokens = ExpertTokens(COUNTS)
    one, all_ = DenseExpertGemms(E, False, w), DenseExpertGemms(E, True, w)
    _close(all_.output(x, tokens), one.output(x, tokens))
    operands = one.prepare_grad_output(dz, tokens, 0)
    _close(all_.grad_input(operands), one.grad_input(operands))
    found = all_.grad_weight(operands, (x,))
    _close(found, one.grad_weight(operands, (x,)))
    assert not found.view(E, N, K)[1].any()
