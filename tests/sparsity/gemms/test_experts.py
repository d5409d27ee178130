"""Experts' GEMMs against one linear an expert; draws that do not know an expert's rank."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megasparse.kernels import is_24, mvue24, prune24_mask
from megasparse.sparsity.autograd.experts import expert_linear
from megasparse.sparsity.gemms.expert_tokens import Arrivals, ExpertTokens
from megasparse.sparsity.gemms.experts import DenseExpertGemms, ReferenceExpertGemms
from megasparse.sparsity.operands import channels_of_expert
from megasparse.sparsity.probe import Probe
from megasparse.sparsity.projection import Projected
from megasparse.sparsity.recipe import make_recipe
from megasparse.sparsity.shard import ShardSlice, WeightShard
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


def test_without_tokens_there_are_groups_for_the_tile_of_zeros():
    none = torch.zeros(0, dtype=torch.int64)
    tokens = Arrivals([0, 0], none, 8, 0, 2).in_tiles(64, True, none.device)
    assert tokens.counts == [64, 0] and tokens.groups.tolist() == [0] * 16


def test_numbers_of_groups_stay_below_2_to_the_32():
    """And by default every place is a segment of the only expert."""
    places = torch.tensor([2**31, 2**31 + 1, 5])
    tokens = Arrivals([2, 1], places, 2**29, 1, 3).in_tiles(4, True, places.device)
    expected = [(int(p) * 3 + 1 + e) % 2**32 for p, e in zip(places[::2], (0, 1))]
    assert _groups_with_tokens(tokens) == expected and max(expected) < 2**32
    alone = Arrivals([2, 1], torch.tensor([4, 5, 4])).in_tiles(4, True, places.device)
    assert _groups_with_tokens(alone) == [4, 5, 5]


def _groups_with_tokens(tokens):
    """What they draw by, in the order of the rows."""
    return tokens.groups[(tokens.spots // 4).unique()].tolist()


def test_one_launch_is_for_16_bits_on_a_gpu_if_it_is_asked_for():
    def asked(gemms, is_cuda=True, dtype=torch.bfloat16):
        return gemms._in_one_launch(SimpleNamespace(is_cuda=is_cuda, dtype=dtype))

    dense, pruned = (
        DenseExpertGemms(2, True),
        ReferenceExpertGemms(2, make_recipe("ste"), (), None, True),
    )
    for gemms in (dense, pruned):
        assert asked(gemms) and not asked(gemms, is_cuda=False)
        assert not asked(gemms, dtype=torch.float32)
    assert not asked(DenseExpertGemms(2)) and not asked(
        ReferenceExpertGemms(2, make_recipe("ste"), ())
    )
    # Dense experts take tokens as they come; those that draw take groups of four.
    assert (dense.tile, dense.draws, pruned.draws) == (1, False, False)
    assert ReferenceExpertGemms(2, make_recipe("fst"), ()).draws


def test_draws_are_by_the_place_of_each_channel_and_are_told():
    recipe, counts, probe = make_recipe("fst"), [4, 8], Probe()
    parts = (ShardSlice(0, 8, 4), ShardSlice(4, 24, 4))
    gemms = ReferenceExpertGemms(2, recipe, parts, probe)
    dz, groups = torch.randn(12, 8), torch.tensor([3, 1, 7])
    tokens = ExpertTokens(counts, groups)
    operands = gemms.prepare_grad_output(dz, tokens, 5)
    gemms.grad_weight(operands, (torch.eye(12),))
    assert not probe.sums
    probe.ask()
    found = gemms.grad_weight(operands, (torch.eye(12),)).view(2, 8, 12)
    drawn = torch.cat(
        [
            mvue24(dz[:, :4], seed=5, dim=0, offsets=(0, 8), groups=groups),
            mvue24(dz[:, 4:], seed=5, dim=0, offsets=(0, 24), groups=groups),
        ],
        1,
    )
    assert torch.equal(found.sum(0).t(), drawn)
    after = float(drawn.double().square().sum())
    assert float(probe.sums["mvue_after"]) == pytest.approx(after, rel=1e-6)


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
