"""Stops are agreed every few steps where there are many ranks, at the same step on all."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace
from typing import Any

import pytest

from megasparse.distributed.signals import StopRequest
from megasparse.train.agreement import Agreed, Agreement, agreement_interval
from tests import dist


def _agreement(world: int) -> tuple[Agreement, Any, list[list[int]]]:
    stop = SimpleNamespace(reason=lambda duration: 0)
    calls: list[list[int]] = []
    control: Any = SimpleNamespace(world=world, max_over_ranks=lambda v: calls.append(v) or v)
    return Agreement(control, stop), stop, calls  # type: ignore[arg-type]


@pytest.mark.parametrize(("world", "interval"), [(1, 1), (1023, 1), (1024, 2), (16_384, 17)])
def test_the_delay_is_as_stated(world, interval):
    assert agreement_interval(world) == interval
    agreement, stop, calls = _agreement(world)
    for step in range(3 * interval):
        agreed = agreement.at_step(step, writing=False)
        assert (agreed is None) == bool(step % interval)
    assert len(calls) == 3
    stop.reason = lambda duration: 15
    delays = [n for n in range(interval) if agreement.at_step(3 * interval + n, False)]
    assert delays == [0]
    assert [n for n in range(2 * interval) if agreement.in_evaluation(n)] == [0, interval]


def test_a_signal_and_the_time_limit_are_reasons_and_a_signal_comes_first():
    agreement, stop, calls = _agreement(1)
    stop.reason = lambda duration: -1
    assert agreement.at_step(0, True) == Agreed(-1, True)
    stop.reason = lambda duration: signal.SIGTERM
    assert agreement.at_step(0, False) == Agreed(15, False)
    assert calls == [[1, 0, 1], [0, 15, 0]]


def _stopped(rank: int, world: int) -> list[tuple[int, int, bool]]:
    """Rank 2 is signalled at step 3 and writes until step 2; each rank's answers."""
    from megasparse.distributed.control_plane import make_control_plane

    stop = StopRequest().install()
    agreement = Agreement(make_control_plane(), stop)
    found = []
    for step in range(6):
        if rank == 2 and step == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
        agreed = agreement.at_step(step, rank == 2 and step < 2)
        assert agreed is not None
        found.append((step, agreed.reason, agreed.writing))
        if agreed.reason:
            break
    return found


def test_all_ranks_stop_at_the_same_step():
    expected = [(0, 0, True), (1, 0, True), (2, 0, False), (3, int(signal.SIGUSR1), False)]
    assert dist.run(_stopped, 3) == [expected] * 3
