"""When a step of somebody else's loop is over, and what its draws depend on."""

from __future__ import annotations

import pytest

from megasparse.sparsity.automatic.run import Run
from megasparse.sparsity.clock import Clock
from megasparse.sparsity.recipe import make_recipe


class Scaling:
    """Of FP8 operands; notes what it is asked."""

    def __init__(self, host_follows):
        self.host_follows, self.finished, self.assumed = host_follows, 0, []

    def finish_step(self):
        self.finished += 1

    def assume(self):
        self.assumed.append(self.finished)


@pytest.mark.parametrize("host_follows", [False, True])
def test_scales_are_asked_for_rarely(host_follows):
    """After steps that are powers of two, where the host does not know them anyway."""
    scaling = Scaling(host_follows)
    run = Run(make_recipe("fst"), Clock(0, 100), scaling=scaling)
    run.finish_step()  # nobody has stepped
    run.begin_forward()
    assert run.clock.step == scaling.finished == 0
    for step in range(1, 10):
        run.stepped = True
        run.begin_forward()
        run.begin_forward()
        assert run.clock.step == scaling.finished == step and not run.stepped
    assert scaling.assumed == ([] if host_follows else [1, 2, 4, 8])


def test_micro_batches_are_numbered_over_all_ranks(monkeypatch):
    run = Run(make_recipe("fst"), Clock(3, 100, step=2))
    assert run.monitor and run.place() == (0, 1)
    assert [run.seed(7, number) for number in (0, 4)] == [_seed(0), _seed(4)]
    monkeypatch.setattr(run, "place", lambda: (2, 3))
    assert [run.seed(7, number) for number in (0, 4)] == [_seed(2), _seed(14)]


def _seed(micro_batch):
    return Clock(3, 100, step=2, micro_batch=micro_batch).mvue_seed(7)


def test_the_phase_of_the_step_says_what_is_done():
    recipe = make_recipe("fst", sparsity_phases="dense:1/2,fst:1/2", masked_decay=0.5)
    run = Run(recipe, Clock(0, 4))
    for run.clock.step, sparse in enumerate((False, False, True, True)):
        assert run.sparse_now == sparse and run.masked_decay() == 0.5 * sparse
        assert run.regulariser == ("masked_decay" if sparse else "none")
