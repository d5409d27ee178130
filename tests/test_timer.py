"""Where the time of a step goes: spans, and the collectives of torch."""

from __future__ import annotations

import torch

from megasparse import timer as timer_module
from megasparse.timer import PHASES, StepTimer
from tests import dist


def test_every_moment_belongs_to_the_innermost_span(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(timer_module.time, "perf_counter", lambda: float(next(clock)))
    timer = StepTimer()
    with timer.span("forward"):
        pass  # not measuring: takes no time from the clock
    timer.start()  # 0
    stream = timer.waiting_for([1, 2])
    assert next(stream) == 1  # data: 1 to 2
    with timer.span("forward"), timer.span("preparation"):  # forward 3, 4; preparation 4, 5
        pass  # back in forward 5, in other 6
    timer.stop()  # 7
    marks = timer.take()
    expected = {"other": 3.0, "data": 1.0, "forward": 2.0, "preparation": 1.0}
    assert timer.seconds(marks) == {**dict.fromkeys(PHASES, 0.0), **expected}
    assert timer.take() == [] and timer.seconds([]) == {}


def _collectives(rank, world):
    import torch.distributed as group

    before = {name: vars(group.ProcessGroup).get(name) for name in ("allreduce", "send")}
    timer = StepTimer()
    timer.start()
    value = torch.ones(4)
    group.all_reduce(value)
    work = group.all_reduce(value, async_op=True)
    work.wait()
    timer.stop()
    after = {name: vars(group.ProcessGroup).get(name) for name in ("allreduce", "send")}
    measured = timer.seconds(timer.take())
    group.all_reduce(value)
    return value.tolist(), before == after, measured["communication"] > 0


def test_collectives_are_timed_and_left_as_they_were():
    assert dist.run(_collectives, 2) == [([8.0] * 4, True, True)] * 2
