"""Experts' GEMMs against one linear an expert; draws that do not know an expert's rank."""

from __future__ import annotations

import pytest
import torch

from megasparse.kernels import is_24, mvue24, prune24_mask
from megasparse.sparsity.autograd.experts import expert_linear
from megasparse.sparsity.gemms.experts import Arrivals, DenseExpertGemms, ReferenceExpertGemms
from megasparse.sparsity.operands import channels_of_expert
from megasparse.sparsity.projection import Projected
from megasparse.sparsity.recipe import make_recipe
from megasparse.sparsity.shard import WeightShard
from megasparse.sparsity.state import SparseWeight

E, N, K = 3, 8, 12
COUNTS = [5, 0, 9]


def _weights(experts: int = E) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(experts * N, K, dtype=torch.float64)


@pytest.mark.parametrize("pruned", [False, True])
def test_the_three_gemms_are_those_of_one_linear_an_expert(pruned):
    weight = _weights()
    mask = prune24_mask(weight.float())
    gemms = DenseExpertGemms(E, w_NK=weight)
    if pruned:
        gemms = ReferenceExpertGemms(E, make_recipe("ste"), ())
        gemms.refill(weight, Projected(mask))
    x = torch.randn(sum(COUNTS), K, dtype=torch.float64, requires_grad=True)
    stacked = weight.clone().requires_grad_()
    dz = torch.randn(sum(COUNTS), N, dtype=torch.float64)
    z = expert_linear(x, stacked, gemms, Arrivals(COUNTS))
    z.backward(dz)
    used = weight * mask if pruned else weight
    for n, (rows, part) in enumerate(zip(x.split(COUNTS), z.split(COUNTS), strict=True)):
        w = used.view(E, N, K)[n]
        assert torch.allclose(part, rows @ w.t())
        g = dz.split(COUNTS)[n]
        assert torch.allclose(x.grad.split(COUNTS)[n], g @ w)
        assert torch.allclose(stacked.grad.view(E, N, K)[n], g.t() @ rows)


def _batch(experts: int, batches: int, tokens: int) -> dict[int, list[int]]:
    """By expert the places of its tokens."""
    generator = torch.Generator().manual_seed(5)
    chosen = torch.rand(experts, batches * tokens, generator=generator) < 0.4
    return {e: torch.nonzero(chosen[e]).flatten().tolist() for e in range(experts)}


def test_draws_depend_on_the_token_and_not_on_who_computes_it():
    """All experts and micro-batches at once, in another order, and an expert at a time."""
    experts, batches, tokens = 4, 3, 7
    places = _batch(experts, batches, tokens)
    torch.manual_seed(0)
    values = torch.randn(experts, batches * tokens, N)
    x = torch.randn(batches * tokens, K)
    shard = WeightShard((experts * N, K))

    def gradient(own: list[int], wanted: list[int], shuffle: bool) -> torch.Tensor:
        """Of the experts `own`, from the micro-batches `wanted`."""
        rows = []
        for e in own:
            here = [p for p in places[e] if p // tokens in wanted]
            rows.append(here[::-1] if shuffle else here)
        flat = [(e, p) for e, here in zip(own, rows, strict=True) for p in here]
        arrivals = Arrivals(
            [len(here) for here in rows],
            torch.tensor([p for _, p in flat], dtype=torch.int64),
            tokens,
            own[0],
            experts,
        )
        gemms = ReferenceExpertGemms(
            len(own), make_recipe("fst"), channels_of_expert(shard, experts)
        )
        dz = torch.stack([values[e, p] for e, p in flat]) if flat else values.new_zeros(0, N)
        inputs = x[[p for _, p in flat]]
        return gemms.grad_weight(dz, inputs, arrivals, 17).view(len(own), N, K)

    whole = gradient([0, 1, 2, 3], [0, 1, 2], shuffle=False)
    assert whole.abs().sum() > 0
    assert torch.allclose(gradient([0, 1, 2, 3], [0, 1, 2], shuffle=True), whole, atol=1e-5)
    halves = torch.cat([gradient([0, 1], [0, 1, 2], False), gradient([2, 3], [0, 1, 2], False)])
    assert torch.allclose(halves, whole, atol=1e-5)
    apart = sum(gradient([0, 1, 2, 3], [n], shuffle=False) for n in range(batches))
    assert torch.allclose(apart, whole, atol=1e-5)


@pytest.mark.parametrize("multiple", [4, 64])
def test_groups_have_tokens_of_one_micro_batch(multiple):
    places = torch.tensor([3, 0, 9, 8, 1, 15, 2, 2, 12])
    draws = Arrivals([7, 0, 2], places, 8, 3, 8).draws(multiple)
    assert [count % multiple for count in draws.counts] == [0, 0, 0] and draws.counts[1] == 0
    assert len(draws.source) == sum(draws.counts) == 4 * len(draws.groups)
    kept = [n for n in draws.source.tolist() if n < len(places)]
    assert sorted(kept) == list(range(len(places)))
    for group in draws.source.view(-1, 4).tolist():
        assert len({int(places[n]) // 8 for n in group if n < len(places)}) <= 1
    assert draws.groups[0] == 0 * 8 + 3  # token 0 of expert 3
    dz = torch.randn(len(places), N)[draws.source.clamp(max=8)]
    drawn = mvue24(dz, seed=1, dim=0, groups=draws.groups)
    assert is_24(drawn, dim=0)


def test_no_token_at_all():
    draws = Arrivals([0, 0], torch.empty(0, dtype=torch.int64), 4, 0, 2).draws(64)
    assert draws.counts == [0, 0] and not len(draws.groups)


def test_every_expert_has_a_scale_of_its_own_and_a_state_that_comes_back():
    weight = _weights().float()
    weight[:N] *= 10
    state = SparseWeight("w", make_recipe("s_ste"), WeightShard((E * N, K)), experts=E)
    gemms = state.gemms(weight, 0, True, True)
    x = torch.randn(6, K)
    z = gemms.output(x, Arrivals([2, 2, 2]))
    for n in range(E):
        alone = SparseWeight("w", make_recipe("s_ste"), WeightShard((N, K)))
        part = weight.view(E, N, K)[n].contiguous()
        expected = alone.gemms(part, 0, True, True).output(x[2 * n : 2 * n + 2])
        assert torch.allclose(z[2 * n : 2 * n + 2], expected, atol=1e-5)
        assert float(state.scale[n]) == pytest.approx(float(alone.scale), rel=1e-6)
    again = SparseWeight("w", make_recipe("s_ste"), WeightShard((E * N, K)), experts=E)
    again.import_state(state.export_state(), weight.device)
    assert torch.equal(again.effective(weight), state.effective(weight))


@pytest.mark.parametrize(("dim", "parts"), [(0, 2), (1, 1)])
def test_channels_are_those_of_one_expert(dim, parts):
    """Rows of a shard that is fused and cut, in a block of experts."""
    experts, blocks, rows = 4, 2, 16
    fused = parts * experts // blocks if dim == 0 else 1
    shard = WeightShard((experts * rows, 8), dim, 1, 2, fused, 1, blocks)
    found = channels_of_expert(shard, experts // blocks)
    alone = WeightShard((rows, 8), dim, 1, 2, parts)
    assert found == alone.slices(0)
