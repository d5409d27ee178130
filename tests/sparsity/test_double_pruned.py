"""A weight that is pruned once more for grad_input: against brute force, in shards, in a layer."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from megasparse.kernels import is_24
from megasparse.sparsity.autograd.linear import linear
from megasparse.sparsity.projection import double_pruned
from megasparse.sparsity.recipe import make_recipe
from megasparse.sparsity.shard import WeightShard
from megasparse.sparsity.state import SparseWeight
from megasparse.sparsity.stats import layer_figures, measure

PAIRS = tuple(combinations(range(4), 2))


def by_hand(w):
    """Of each four along N the pair with the largest squares; of equal ones the later rows."""
    found = torch.zeros_like(w)
    for column in range(w.shape[1]):
        for row in range(0, w.shape[0], 4):
            four = w[row : row + 4, column]
            squares = four.double().square().tolist()
            pair = max(PAIRS, key=lambda p: (squares[p[0]] + squares[p[1]], p[1], p[0]))
            for place in pair:
                found[row + place, column] = four[place]
    return found


@pytest.mark.parametrize("recipe", ["ste", "s_ste"])
def test_the_two_largest_of_each_four_rows(recipe):
    torch.manual_seed(0)
    # Halves make ties, in the weight and in its soft threshold; a row of zeros leaves fewer.
    w = (torch.randn(16, 24) * 2).round() / 2
    w[5], w[8:12, 3] = 0, -1.0
    effective = _state(recipe, w).effective(w)
    assert is_24(effective) and not is_24(effective, dim=0)
    found = double_pruned(effective)
    assert torch.equal(found, by_hand(effective)) and is_24(found, dim=0) and is_24(found)


@pytest.mark.parametrize("ranks", [2, 4])
def test_of_a_shard_it_is_the_shard_of_the_whole(ranks):
    w = torch.randn(32, 32, generator=torch.Generator().manual_seed(1)).round(decimals=1)
    for shard in (
        *(
            WeightShard((32, 32), 0, rank, ranks, parts)
            for rank in range(ranks)
            for parts in (1, 2)
        ),
        *(WeightShard((32, 32), 1, rank, ranks) for rank in range(ranks)),
    ):
        assert torch.equal(double_pruned(shard.slice_of(w)), shard.slice_of(double_pruned(w)))


def _state(recipe, w, **overrides):
    state = SparseWeight("w", make_recipe(recipe, **overrides), WeightShard(tuple(w.shape)))
    state.gemms(w, 0, True, True)
    return state


def _figures(state, w):
    measured = measure([(state, torch.nn.Parameter(w))], True, w.device, [])
    sums = measured.weight_sums, measured.step_sums, measured.maxima
    return layer_figures(measured, *(one.tolist() for one in sums))["w"]


@pytest.mark.parametrize(("recipe", "energy"), [("s_ste", 0.035), ("ste", 0.074)])
def test_what_normal_weights_lose(recipe, energy):
    """Fewer than half of the entries are in two of four both ways, and they hold most squares."""
    w = torch.randn(512, 1024, generator=torch.Generator().manual_seed(2))
    state = _state(recipe, w, sparse_grad_input="double-pruned")
    effective = state.effective(w)
    again = double_pruned(effective)
    assert float((again != 0).double().mean()) == pytest.approx(0.406, abs=2e-3)
    lost = float((effective - again).square().sum() / effective.square().sum())
    assert lost == pytest.approx(energy, abs=1e-3)
    assert _figures(state, w)["double_pruned"] == pytest.approx(lost, rel=1e-5)
    assert "double_pruned" not in _figures(_state(recipe, w), w)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("recipe", ["ste", "sr_ste", "ast", "s_ste", "s_ste_3"])
def test_only_the_gradient_of_the_input_knows_it(recipe, fp8):
    generator = torch.Generator().manual_seed(3)
    w = torch.randn(8, 12, generator=generator).requires_grad_()
    x, dz = torch.randn(8, 12, generator=generator), torch.randn(8, 8, generator=generator)
    grads, outputs = {}, {}
    for kind in ("exact", "double-pruned"):
        state = _state(recipe, w.detach(), sparse_grad_input=kind, simulate_fp8=fp8)
        leaf, w.grad = x.clone().requires_grad_(), None
        z = linear(leaf, w, state.gemms(w, 0, True, True), seed=1)
        z.backward(dz)
        outputs[kind], grads[kind] = z.detach(), (leaf.grad, w.grad)
        effective = state.effective(w.detach())
        weight = by_hand(effective) if kind == "double-pruned" else effective
        tolerance = {"rtol": 0.2, "atol": 0.5} if fp8 else {}
        torch.testing.assert_close(leaf.grad, dz @ weight, **tolerance)
    assert torch.equal(outputs["exact"], outputs["double-pruned"])
    assert torch.equal(grads["exact"][1], grads["double-pruned"][1])
    assert not torch.allclose(grads["exact"][0], grads["double-pruned"][0])


def test_operands_of_later_steps_are_where_those_of_the_first_were():
    w = torch.randn(8, 12)
    state = _state("s_ste_3", w)
    place = state.gemms(w, 0, True, True)._of_grad_input.data_ptr()
    gemms = state.gemms(w + 1, 1, True, True)
    assert gemms._of_grad_input.data_ptr() == place
    assert torch.equal(gemms._of_grad_input, by_hand(state.effective(w + 1)))
