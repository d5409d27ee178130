"""All sparse weights of a model: one step of the clock, and what a run asks about them."""

from __future__ import annotations

import pytest
import torch

from megasparse.fp8.delayed import DelayedScaling
from megasparse.kernels import transposable24_mask
from megasparse.sparsity.clock import Clock
from megasparse.sparsity.controller import SparsityController
from megasparse.sparsity.dense_weight import DenseFp8Weight
from megasparse.sparsity.gemms.dense_fp8 import OperandQuantizers
from megasparse.sparsity.gradient_sum import StepSums
from megasparse.sparsity.own_decay import OwnDecay
from megasparse.sparsity.recipe import make_recipe
from megasparse.sparsity.seeds import DeviceSeeds
from megasparse.sparsity.shard import WeightShard
from megasparse.sparsity.state import SparseWeight

N, K = 8, 12


def controller_of(recipe="fst", kinds=(None, 2), dense=0, steps=100, **settings):
    """Of weights of these numbers of experts (None: no experts'), and of dense ones in FP8."""
    made = make_recipe(recipe, **settings)
    controller = SparsityController(made, Clock(5, steps))
    for number, experts in enumerate(kinds):
        rows = N * (experts or 1)
        state = SparseWeight(f"w{number}", made, WeightShard((rows, K)), experts=experts)
        place = controller.register(state, torch.nn.Parameter(torch.randn(rows, K)), 10 + number)
        assert place == number and state.probe.timer is controller.timer
        assert state.train_iters == steps
    if dense:
        controller.fp8 = DelayedScaling(torch.device("cpu"))
        slots = [OperandQuantizers.of(controller.fp8) for _ in range(dense)]
        controller.fp8.allocate()
        for number in range(dense):
            experts = None if number == 0 else 2
            one = DenseFp8Weight(f"d{number}", slots[number], experts=experts)
            weight = torch.nn.Parameter(torch.randn(256 if experts else 128, 128).bfloat16())
            controller.dense.append((one, weight))
    return controller


def states(controller):
    return [state for state, _ in controller.weights]


def begin(controller, step):
    controller.clock.step = step
    controller.begin_step()
    controller.refill()
    controller.refill_experts()


def test_a_fresh_one_monitors_and_measures_nothing():
    controller = controller_of(kinds=())
    assert controller.monitor and not controller.calibrating and not controller.has_operands
    assert (controller.moves, controller.refreshes, controller.preparations(0)) == (0, 0, 0)
    assert not controller.asked and controller.steps_done == 0
    assert controller_of().has_operands and controller_of(kinds=(), dense=1).has_operands


def test_a_step_begins_once_for_all_weights():
    controller = controller_of(dense=2, mask_update_interval=2)
    for step in range(4):
        begin(controller, step)
        begin(controller, step)  # again: what is there stays
        assert all(state.ready_for == (step, True) for state in states(controller))
        assert all(one.ready_for == step for one, _ in controller.dense)
        assert [state.refreshes for state in states(controller)] == [step // 2 + 1] * 2
        assert controller.refreshes == 2 * (step // 2 + 1)
        assert controller.preparations(step) == 1 and controller.preparations(step + 1) == 0
    assert [state.preparations for state in states(controller)] == [4, 4]
    states(controller)[1].invalidate()
    controller.begin_step()
    assert controller.preparations(3) == 2  # the most of any
    controller.invalidate()
    assert all(state.ready_for is None for state in states(controller))
    assert all(one.ready_for == -1 for one, _ in controller.dense)


def test_operands_of_experts_are_made_apart():
    controller = controller_of(dense=2)
    controller.begin_step()
    owners = [*states(controller), *(one for one, _ in controller.dense)]
    filled = []
    for one in owners:
        refill = one.refill
        one.refill = lambda *a, one=one, r=refill: (filled.append(one), r(*a))
    controller.refill()
    assert filled == [owners[0], owners[2]]
    filled.clear()
    controller.refill_experts()
    assert filled == [owners[1], owners[3]]


def test_masks_are_refreshed_together_where_all_are_due_and_stay_where_they_are():
    controller, calls = controller_of(mask_update_interval=1), []

    def together():
        calls.append(controller.clock.step)
        controller.refresh()

    def step(number):
        controller.clock.step = number
        controller.begin_step(together)
        return [state.last_refresh for state in states(controller)]

    for number in range(4):
        with torch.no_grad():
            for _, weight in controller.weights:
                weight.add_(torch.randn_like(weight))
        assert step(number) == [number] * 2
        for state, weight in controller.weights:
            assert torch.equal(state.mask, transposable24_mask(weight.detach()))
    assert calls == [2, 3]  # of the first two some have no mask, or no flips
    states(controller)[0].invalidate()
    assert step(3) == [3, 3] and calls == [2, 3]
    states(controller)[0].gemms(controller.weights[0][1], 4, True, True)
    assert step(4) == [4, 4] and calls == [2, 3]  # one was made before
    slow = controller_of(mask_update_interval=2)
    for slow.clock.step in range(3):
        slow.begin_step(lambda: pytest.fail("not all are in place"))


def test_a_step_that_is_skipped_is_undone():
    controller = controller_of(dense=1, mask_update_interval=1)
    for step in range(3):
        begin(controller, step)
    controller.fp8.finish_step = lambda: finished.append(1)
    finished: list[int] = []
    controller.finish_step()
    assert finished == [1]
    masks = [state.mask.clone() for state in states(controller)]
    history, saved = controller.fp8.history.clone(), controller.snapshot()
    with torch.no_grad():
        for _, weight in (*controller.weights, *controller.dense):
            weight.neg_().add_(torch.randn_like(weight))
    begin(controller, 3)
    assert not any(torch.equal(s.mask, m) for s, m in zip(states(controller), masks))
    assert not torch.equal(controller.fp8.history, history)
    controller.restore(saved)
    assert all(torch.equal(s.mask, m) for s, m in zip(states(controller), masks))
    assert torch.equal(controller.fp8.history, history)
    assert [one.ready_for for one, _ in controller.dense] == [-1]
    without = controller_of()
    without.finish_step()
    without.restore(without.snapshot())


def test_layers_add_up_the_gradients_that_there_is_a_place_for_and_nobody_else_computes_with():
    controller, step = controller_of(dense=2), StepSums()
    weights = [weight for _, weight in (*controller.weights, *controller.dense)]
    places = {weight: torch.zeros_like(weight) for weight in weights}
    left = places.pop(weights[1]), places.pop(weights[3])
    assert len(left) == 2 and controller.add_up_in(places, step) == {weights[0], weights[2]}
    (first, other), ((dense, _), (stacked, _)) = states(controller), controller.dense
    assert first.total.total is places[weights[0]] and first.total.step is step
    assert dense.total.total is places[weights[2]] and dense.total.step is step
    assert other.total is None and stacked.total is None
    places |= {weights[1]: left[0], weights[3]: left[1]}
    assert controller.add_up_in(places, step) == set(weights)
    assert other.total.total is left[0] and stacked.total.total is left[1]
    some = controller_of(dense=1)
    assert some.add_up_in({}, step) == set() and states(some)[0].total is None
    cast = controller_of("cast", kinds=(None,))
    assert cast.add_up_in({cast.weights[0][1]: torch.zeros(N, K)}, step) == set()


def test_addresses_that_move_are_counted_for_all():
    controller = controller_of(dense=1)
    for (one, _), moves in zip((*controller.weights, *controller.dense), (1, 2, 4)):
        one.moves = moves
    assert controller.moves == 7


def test_all_probes_measure_or_none():
    controller = controller_of(dense=1)
    probes = [one.probe for one, _ in (*controller.weights, *controller.dense)]
    controller.ask(True)
    assert [p.asked for p in probes] == [True] * 3 and controller.asked
    controller.ask(False)
    assert not any(p.asked for p in probes) and not controller.asked
    probes[2].ask()
    assert controller.asked


def test_flops_that_are_saved():
    """Half of 2 N K for each GEMM that has run sparse, the output's again where it is redone."""
    controller = controller_of()
    assert controller.halved_flops_per_token(0.0) == 0.0
    begin(controller, 0)
    first, second = states(controller)
    first._gemms[True].ran_sparse |= {"output", "grad_input"}
    second._gemms[True].ran_sparse |= {"output"}
    second.active_share = 0.25
    assert controller.halved_flops_per_token(0.0) == 2 * N * K + 0.25 * 2 * N * K
    assert controller.halved_flops_per_token(0.5) == 2.5 * N * K + 0.25 * 1.5 * 2 * N * K


def test_seeds_are_the_devices_if_it_has_them():
    controller = controller_of()
    controller.clock.step, controller.clock.micro_batch = 3, 2
    assert controller.seed(1) == controller.clock.mvue_seed(11)
    assert controller.step_seed(1) == controller.clock.step_seed(11)
    controller.seeds = DeviceSeeds(controller.clock, controller.layers, torch.device("cpu"), 2)
    controller.seeds.begin_step([2])
    controller.clock.slot = 1
    controller.seeds.begin_micro_batch(0, 1)
    assert int(controller.seed(1)) == controller.clock.mvue_seed(11)
    assert int(controller.seeds.of(1, 0)) == 0


def test_the_decay_of_a_run_is_the_mean_of_its_weights():
    controller = controller_of(
        kinds=(None, None),
        masked_decay_rho=0.05,
        sparsity_phases="fst:1/2,dense:1/2",
        steps=8,
    )
    assert controller.masked_decay() == 0.0 and controller.mean_decay == 0.0
    for state, value in zip(states(controller), (1.0, 4.0)):
        state.decay = OwnDecay(torch.device("cpu"))
        state.decay.value.fill_(value)
    assert controller.masked_decay() == 0.0  # as it was known
    controller.mean_decay = None
    assert (controller.masked_decay(), controller.decay_factor()) == (2.5, 1.0)
    controller.clock.step = 4
    assert (controller.masked_decay(), controller.decay_factor()) == (0.0, 0.0)
    plain = controller_of(masked_decay=0.5)
    assert plain.masked_decay() == plain.decay_factor() == 0.5


def test_what_is_kept_of_the_momentum():
    cast = controller_of("cast", steps=8, kinds=())
    cast.clock.step = 2
    assert cast.kept_momentum() == 0.75
    assert controller_of().kept_momentum() == 1.0


def test_a_mask_decays_its_weight_in_phases_that_decay():
    controller = controller_of(sparsity_phases="fst:1/2,dense:1/2", steps=4)
    assert list(controller.masked_weights()) == []  # nothing was searched
    begin(controller, 0)
    found = list(controller.masked_weights())
    assert [weight for weight, _ in found] == [weight for _, weight in controller.weights]
    assert all(mask is state.mask for (_, mask), state in zip(found, states(controller)))
    controller.clock.step = 2
    assert list(controller.masked_weights()) == [] and not controller.sparse_now
