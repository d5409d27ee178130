"""All that experts compute as one function: what its parts one by one compute, to the last bit."""

from __future__ import annotations

import pytest
import torch

from megasparse.fp8.current import CurrentScaling
from megasparse.fp8.delayed import DelayedScaling
from megasparse.kernels import activated, expert_routes, transposable24_mask
from megasparse.sparsity.autograd.experts import (
    expert_feed_forward,
    expert_linear,
    rows_of_tokens,
    rows_of_weights,
    tokens_of_rows,
)
from megasparse.sparsity.gemms.choice import GemmChooser
from megasparse.sparsity.gemms.dense_fp8 import OperandQuantizers
from megasparse.sparsity.gemms.expert_tokens import Arrivals
from megasparse.sparsity.gemms.experts import DenseExpertGemms, ReferenceExpertGemms
from megasparse.sparsity.gemms.fp8_experts import DenseFp8ExpertGemms
from megasparse.sparsity.gemms.packed_fp8_experts import PackedFp8ExpertGemms
from megasparse.sparsity.gradient_sum import GradientSum, StepSums
from megasparse.sparsity.projection import Projected
from megasparse.sparsity.recipe import make_recipe
from megasparse.sparsity.shard import ShardSlice
from tests.transformer_engine import needs_transformer_engine

E, H, F, T, EACH = 3, 128, 128, 60, 2


def _gemms(kind: str, w: torch.Tensor, scaling) -> object:
    """Of one linear, with operands."""
    rows = w.shape[0] // E
    channels, recipe = (ShardSlice(0, 0, rows),), make_recipe("fst")
    if kind == "dense":
        return DenseExpertGemms(E, w_NK=w)
    quantizers = None if scaling is None else OperandQuantizers.of(scaling, of_experts=True)
    if kind == "dense fp8":
        gemms = DenseFp8ExpertGemms(E, quantizers)
    elif kind == "reference":
        gemms = ReferenceExpertGemms(E, recipe, channels)
    else:
        chooser = GemmChooser(None) if w.is_cuda else None
        gemms = PackedFp8ExpertGemms(E, recipe, channels, quantizers, chooser=chooser)
    return gemms


def _both(kind: str, weights: tuple[torch.Tensor, torch.Tensor], scale: type | None) -> tuple:
    device = weights[0].device
    scaling = None if scale is None else scale(device) if scale is DelayedScaling else scale()
    both = tuple(_gemms(kind, w, scaling) for w in weights)
    if scaling is not None:
        scaling.allocate()
    for gemms, w in zip(both, weights, strict=True):
        if kind != "dense":
            gemms.refill(w, None if kind == "dense fp8" else Projected(transposable24_mask(w)))
    return both, scaling


CASES = [
    ("dense", None),
    ("reference", None),
    ("dense fp8", DelayedScaling),
    ("packed fp8", DelayedScaling),
    ("packed fp8", CurrentScaling),
]


@pytest.mark.parametrize(("kind", "scale"), CASES)
@pytest.mark.parametrize(("routed", "added"), [(False, False), (True, True)])
def test_the_whole_is_its_parts(device, kind, scale, routed, added):
    """Twice: scales that follow from an earlier step are known before their tensors."""
    needs_transformer_engine(device)
    torch.manual_seed(1)
    weights = tuple(
        torch.randn(E * n, k, device=device).bfloat16() for n, k in ((2 * F, H), (H, F))
    )
    choice = torch.rand(T, E, device=device)
    choice[:, 1] -= 1  # one expert that few like
    map_TE = torch.zeros_like(choice).bool().scatter_(1, choice.topk(EACH, 1).indices, True)
    routes = expert_routes(map_TE, EACH)
    x_TH = torch.randn(T, H, device=device).bfloat16()
    p = torch.rand(len(routes.tokens), device=device)
    dz = torch.randn(T, H, device=device).bfloat16()

    def computed(parts: bool) -> list[torch.Tensor]:
        both, scaling = _both(kind, weights, scale)
        how = (routes.tokens, 32, 0, E, 2, None, True, routes if routed else None)
        arrivals = Arrivals(map_TE.sum(0).tolist(), *how)
        tokens = arrivals.in_tiles(max(g.tile for g in both), both[0].draws, device)
        step, found = StepSums(open=True), []
        sums = [torch.zeros_like(w, dtype=torch.float32) for w in weights]
        for gemms, total in zip(both, sums, strict=True):
            gemms.total = GradientSum(total, step) if added else None
        for seed in (3, 4):
            x, q, w1, w2 = (t.clone().requires_grad_() for t in (x_TH, p, *weights))
            came = x if routed else x[routes.tokens]
            if parts:
                rows, of_rows = rows_of_tokens(came, tokens), rows_of_weights(q, tokens)
                y = activated(expert_linear(rows, w1, both[0], tokens, seed), "swiglu")
                y = (y * of_rows.unsqueeze(-1)).to(y.dtype)
                z = tokens_of_rows(expert_linear(y, w2, both[1], tokens, seed + 9), tokens)
            else:
                z = expert_feed_forward(came, q, (w1, w2), both, tokens, (seed, seed + 9))
            z.backward(dz if routed else dz[routes.tokens])
            assert (w1.grad is None) == (w2.grad is None) == added
            found += [z.detach(), x.grad, *(sums if added else (w1.grad, w2.grad))]
            found = [t.clone() for t in found]
            dq = q.grad
            if scaling is not None:
                scaling.finish_step()
        with torch.no_grad():
            z = expert_feed_forward(came, q, (w1, w2), both, tokens)
        return [*found, z, dq]

    *whole, dq = computed(False)
    *parts, expected = computed(True)
    for ours, theirs in zip(whole, parts, strict=True):
        assert torch.equal(ours, theirs)
    torch.testing.assert_close(dq, expected, rtol=1e-4, atol=1e-3)


def test_tokens_with_routes_are_what_those_sent_to_each_expert_are(device):
    """Also where a token's place is not its number."""
    generator = torch.Generator().manual_seed(4)
    best = torch.rand(T, E, generator=generator).topk(EACH, 1).indices
    map_TE = torch.zeros(T, E, dtype=torch.bool).scatter_(1, best, True).to(device)
    routes, counts = expert_routes(map_TE, EACH), map_TE.sum(0).tolist()
    places = 5 * routes.tokens + 1000
    x = torch.randn(T, 8, device=device)
    how = (places, 64, 2, 8, 40, 16, True)
    once, sent = Arrivals(counts, *how, routes), Arrivals(counts, *how)
    for tile, draws in ((1, False), (64, False), (64, True)):
        ours, theirs = (a.in_tiles(tile, draws, device) for a in (once, sent))
        assert ours.counts == theirs.counts
        rows = theirs.rows(x[routes.tokens])
        assert torch.equal(ours.rows(x), rows)
        assert (ours.groups is None) != draws
        assert not draws or torch.equal(ours.groups, theirs.groups)
        weights = places.float()
        assert torch.equal(ours.rows_of_weights(weights), theirs.rows_of_weights(weights))
        assert torch.equal(ours.weights_of_rows(ours.rows_of_weights(weights)), weights)
        torch.testing.assert_close(ours.tokens(rows), EACH * x)


@pytest.mark.parametrize("kind", ["dense", "reference"])
@pytest.mark.parametrize("trained", range(1, 16))
def test_each_gradient_is_that_of_all_whatever_else_is_trained(device, kind, trained):
    """Of tokens, probabilities and both weights; what is frozen gets none."""
    torch.manual_seed(2)
    counts = [5, 0, 7]
    weights = tuple(torch.randn(E * n, k, device=device).bfloat16() for n, k in ((16, 8), (8, 8)))
    both, _ = _both(kind, weights, None)
    x, p = torch.randn(12, 8, device=device).bfloat16(), torch.rand(12, device=device)
    dz = torch.randn(12, 8, device=device).bfloat16()
    places = torch.arange(12, device=device)
    arrivals = Arrivals(counts, places, 16, 0, E, 1)
    tokens = arrivals.in_tiles(max(g.tile for g in both), both[0].draws, device)

    def gradients(wanted: list[bool]) -> list[torch.Tensor | None]:
        leaves = [
            t.clone().requires_grad_(w) for t, w in zip((x, p, *weights), wanted, strict=True)
        ]
        expert_feed_forward(*leaves[:2], leaves[2:], both, tokens, (3, 4)).backward(dz)
        return [leaf.grad for leaf in leaves]

    wanted = [bool(trained >> place & 1) for place in range(4)]
    for one, whole, there in zip(gradients(wanted), gradients([True] * 4), wanted, strict=True):
        assert whole is not None and whole.any()
        assert (one is not None) == there and (one is None or torch.equal(one, whole))
