"""What a weight knows of its steps: when masks are searched, what moves, what a skip undoes."""

from __future__ import annotations

import pytest
import torch

from megasparse.fp8.delayed import DelayedScaling
from megasparse.kernels import prune24_mask, s_ste_scale, soft_threshold24, transposable24_mask
from megasparse.kernels.float8 import E5M2
from megasparse.kernels.packed24 import E4M3
from megasparse.sparsity.gemms.dense_fp8 import OperandQuantizers
from megasparse.sparsity.recipe import make_recipe
from megasparse.sparsity.shard import WeightShard
from megasparse.sparsity.state import SparseWeight


def state_of(recipe="fst", shape=(8, 12), steps=None, **settings):
    state = SparseWeight("w", make_recipe(recipe, **settings), WeightShard(shape))
    state.train_iters = steps
    return state


def weights(count, shape=(8, 12)):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def in_fp8(state):
    scaling = DelayedScaling(torch.device("cpu"))
    state.quantizers = OperandQuantizers.of(scaling)
    scaling.allocate()
    return state


def test_a_fresh_weight_knows_nothing():
    state = state_of()
    assert (state.last_refresh, state.refreshes, state.prepared_step) == (-1, 0, -1)
    assert (state.preparations, state.preparations_of_step, state.moves) == (0, 0, 0)
    assert state.active_share == 1.0 and not state.mask_transposable and state.total is None
    assert state.ready_for is None and state.ran_sparse == frozenset()
    assert torch.equal(state.flags(torch.device("cpu")), torch.zeros(2).double())
    assert not state.refreshes_in_place and state.quantizers is None


@pytest.mark.parametrize("first", [0, 1, 2])
def test_preparations_are_counted_by_step(first):
    state, (weight,) = state_of(), weights(1)
    for step in (first, first + 1):
        for times in (1, 2):
            state.gemms(weight, step, True, True)
            assert state.preparations_of_step == times and state.ready_for == (step, True)
            state.gemms(weight, step, True, True)
            state.invalidate()
    assert state.preparations == 4


def test_in_a_dense_phase_masks_are_searched_on_multiples_too():
    state = state_of(sparsity_phases="dense:1/2,fst:1/2", steps=12, mask_update_interval=4)
    found = []
    for step, weight in enumerate(weights(12)):
        state.gemms(weight, step, step >= 6, True)
        found.append(state.last_refresh)
    assert found == [0] * 4 + [4] * 2 + [6] * 2 + [8] * 4
    assert state.refreshes == 4


def test_flips_are_those_of_the_latest_refresh():
    state, all_of_them = state_of("ste", mask_update_interval=1), weights(4)
    masks = [prune24_mask(weight) for weight in all_of_them]
    for step, weight in enumerate(all_of_them):
        state.gemms(weight, step, True, True)
        if step:
            assert int(state.flips) == int((masks[step] != masks[step - 1]).sum())


def test_a_mask_that_only_says_what_decays_is_kept_up_to_date():
    """Of CAST, whose GEMMs are dense; and of whoever asks for the pruned weight."""
    state, (first, second, third) = state_of("cast", mask_update_interval=2), weights(3)
    state.keep_mask(first, 0)
    state.keep_mask(second, 1)  # not due
    assert torch.equal(state.mask, prune24_mask(first))
    assert (state.last_refresh, state.refreshes) == (0, 1)
    state.keep_mask(third, 2)
    assert torch.equal(state.mask, prune24_mask(third))
    assert (state.last_refresh, state.refreshes) == (2, 2)
    fresh = state_of("ste", mask_update_interval=2)
    for step, (weight, mask) in enumerate(((first, first), (second, first), (third, third))):
        expected = weight * prune24_mask(mask)
        assert torch.equal(fresh.effective_at(weight, step), expected)
        assert torch.equal(fresh.effective(weight), expected)


def test_gemms_of_another_phase_are_others_and_that_is_a_move():
    state = state_of(sparsity_phases="fst:1/3,row:1/3,dense:1/3", steps=6)
    made, moves = [], []
    for step, weight in enumerate(weights(6)):
        made.append(state.gemms(weight, step, step < 4, True))
        moves.append(state.moves)
    assert moves == [0, 0, 1, 1, 1, 1]
    assert made[0] is made[1] and made[2] is made[3] and made[4] is made[5]
    assert len({id(one) for one in made}) == 3


def test_what_comes_from_outside_moves():
    state, (weight,) = state_of("s_ste"), weights(1)
    state.keep_scale(2.0, torch.device("cpu"))
    gemms = state.gemms(weight, 0, True, True)
    assert float(state.scale) == 2.0 and state.moves == 1
    state.keep_scale(3.0, torch.device("cpu"))  # of the step that operands are there for
    found = state.gemms(weight, 0, True, True).output(torch.eye(12)).t()
    assert torch.equal(found, soft_threshold24(weight) * 3.0)
    state.forget_operands()
    assert state.moves == 3 and state.ready_for is None
    assert state.gemms(weight, 0, True, True) is not gemms
    state.import_state(state.export_state(), torch.device("cpu"))
    assert state.moves == 4 and float(state.scale) == 3.0


@pytest.mark.parametrize("hybrid", [False, True])
def test_operands_that_an_evaluation_made_are_made_again_for_who_asks(hybrid):
    state, weight = in_fp8(state_of("ste", (128, 128))), weights(1, (128, 128))[0].bfloat16()
    state.fp8_hybrid = hybrid or state.fp8_hybrid
    gemms = state.gemms(weight, 0, True, True)
    assert gemms._row_dtype == (E5M2 if hybrid else E4M3)
    state.probe.ask()
    for _ in range(2):
        assert state.gemms(weight, 0, True, True) is gemms
        assert not state.probe.waits
        assert float(state.probe.sums["fp8_weight_all"]) == weight.numel()  # once
    plain = state_of()
    plain.gemms(weights(1)[0], 0, True, True)
    plain.probe.ask()
    refilled, plain.refill = [], lambda *_: refilled.append(1)
    plain.gemms(weights(1)[0], 0, True, True)
    assert not refilled  # nothing to tell without 8 bits


def test_a_scale_of_every_step_goes_back_to_where_it_was():
    state = state_of("s_ste", s_ste_scale="every_step", mask_update_interval=1)
    all_of_them = weights(4)
    none = state.snapshot()
    state.gemms(all_of_them[3], 0, True, True)
    state.restore(none)
    assert state.scale is None  # nor is one put back that was not there
    for step, weight in enumerate(all_of_them[:3]):
        state.gemms(weight, step, True, True)
    saved, place, moves = state.snapshot(), state.scale.data_ptr(), state.moves
    state.gemms(all_of_them[3], 3, True, True)
    assert float(state.scale) == float(s_ste_scale(all_of_them[3]))
    state.restore(saved)
    assert float(state.scale) == float(s_ste_scale(all_of_them[2]))
    assert (state.scale.data_ptr(), state.moves) == (place, moves)
    assert int(state.flips) == int(
        (prune24_mask(all_of_them[2]) != prune24_mask(all_of_them[1])).sum()
    )


@pytest.mark.parametrize(("recipe", "moved"), [("ste", [2, 1, 0]), ("s_ste", [3, 1, 0])])
def test_a_skipped_step_moves_what_it_takes_away(recipe, moved):
    """The first mask, the first flips, the first scale; later ones stay where they are."""
    state, found = state_of(recipe, mask_update_interval=1), []
    for step, weight in enumerate(weights(3)):
        saved, before = state.snapshot(), state.moves
        state.gemms(weight, step, True, True)
        state.restore(saved)
        found.append(state.moves - before)
        state.gemms(weight, step, True, True)
    assert found == moved


def test_a_step_that_refreshed_nothing_is_undone_as_well():
    state = state_of(mask_update_interval=10)
    first, second, third = weights(3)
    state.gemms(first, 0, True, True)
    state.gemms(second, 10, True, True)
    flips, mask = int(state.flips), state.mask.clone()
    for step in (11, 12):
        saved = state.snapshot()
        state.gemms(third, step, True, True)
        state.restore(saved)
        assert int(state.flips) == flips and torch.equal(state.mask, mask)
        assert (state.last_refresh, state.prepared_step) == (10, 10)
    assert torch.equal(mask, transposable24_mask(second))


def test_a_probe_that_asks_measures_a_skipped_step_anew():
    state, (weight,) = state_of(), weights(1)
    state.gemms(weight, 0, True, True)
    state.restore(state.snapshot())
    assert not state.probe.asked
    state.probe.ask()
    state.probe.waits = False
    state.restore(state.snapshot())
    assert state.probe.asked and state.probe.waits
