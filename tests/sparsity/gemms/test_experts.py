"""Experts' GEMMs against one linear an expert; draws that do not know an expert's rank."""

from __future__ import annotations

import pytest
import torch

from megasparse.kernels import is_24, mvue24, prune24_mask
from megasparse.sparsity.autograd.experts import expert_linear
from megasparse.sparsity.gemms.expert_tokens import Arrivals, ExpertTokens
from megasparse.sparsity.gemms.experts import DenseExpertGemms, ReferenceExpertGemms
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
    z = expert_linear(x, stacked, gemms, ExpertTokens(COUNTS), 0)
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
        order = arrivals.in_tiles(1, True, dz.device)
        operands = gemms.prepare_grad_output(order.rows(dz), order, 17)
        return gemms.grad_weight(operands, (order.rows(inputs),)).view(len(own), N, K)

    whole = gradient([0, 1, 2, 3], [0, 1, 2], shuffle=False)
    assert whole.abs().sum() > 0
    assert torch.allclose(gradient([0, 1, 2, 3], [0, 1, 2], shuffle=True), whole, atol=1e-5)
    halves = torch.cat([gradient([0, 1], [0, 1, 2], False), gradient([2, 3], [0, 1, 2], False)])
    assert torch.allclose(halves, whole, atol=1e-5)
    apart = sum(gradient([0, 1, 2, 3], [n], shuffle=False) for n in range(batches))
    assert torch.allclose(apart, whole, atol=1e-5)


@pytest.mark.parametrize("tile", [4, 64])
def test_groups_have_tokens_of_one_micro_batch(tile):
    places = torch.tensor([3, 0, 9, 8, 1, 15, 2, 2, 12])
    tokens = Arrivals([7, 0, 2], places, 8, 3, 8).in_tiles(tile, True, places.device)
    assert [count % tile for count in tokens.counts] == [0, 0, 0] and tokens.counts[1] == 0
    assert sum(tokens.counts) == 4 * len(tokens.groups)
    assert len(set(tokens.spots.tolist())) == len(places)
    rows = tokens.rows(places + 1)  # 0: no token
    assert torch.equal(tokens.tokens(rows), places + 1)
    for group in rows.view(-1, 4).tolist():
        assert len({(place - 1) // 8 for place in group if place}) <= 1
    assert tokens.groups[0] == 0 * 8 + 3  # token 0 of expert 3
    drawn = mvue24(tokens.rows(torch.randn(len(places), N)), seed=1, dim=0, groups=tokens.groups)
    assert is_24(drawn, dim=0)


@pytest.mark.parametrize("counts", [[3, 0, 130], [0, 0, 0], [0, 128, 1]])
@pytest.mark.parametrize("draws", [False, True])
def test_rows_are_whole_tiles_with_every_token_once(counts, draws):
    """Without groups tokens keep their order; without tokens there is a tile of zeros."""
    total = sum(counts)
    arrivals = Arrivals(counts, torch.arange(total) if draws else None, 200, 0, 3)
    tokens = arrivals.in_tiles(128, draws, torch.device("cpu"))
    assert [n % 128 for n in tokens.counts] == [0, 0, 0] and sum(tokens.counts)
    x = torch.arange(1.0, total + 1).view(-1, 1).expand(-1, 2).contiguous()
    rows = tokens.rows(x)
    assert rows.shape == (sum(tokens.counts), 2) and rows.sum() == x.sum()
    assert torch.equal(tokens.tokens(rows), x)
    for own, part in zip(x.split(counts), rows.split(tokens.counts), strict=True):
        assert torch.equal(part[part[:, 0] > 0], own)
    assert (tokens.groups is None) != draws
    assert Arrivals(counts).in_tiles(1, False, x.device) == ExpertTokens(counts)


def test_every_expert_has_a_scale_of_its_own_and_a_state_that_comes_back():
    weight = _weights().float()
    weight[:N] *= 10
    state = SparseWeight("w", make_recipe("s_ste"), WeightShard((E * N, K)), experts=E)
    gemms = state.gemms(weight, 0, True, True)
    x = torch.randn(6, K)
    z = gemms.output(x, ExpertTokens([2, 2, 2]))
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
