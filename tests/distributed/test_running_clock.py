"""Time in which a process was stopped does not count."""

from __future__ import annotations

import os
import signal
import sys
import time

from megasparse.distributed.running_clock import GAP_SECONDS, RunningClock

_COUNT = """
import sys, time
from megasparse.distributed import running_clock
running_clock.GAP_SECONDS = 0.5
clock = running_clock.RunningClock()
begin, real = clock.now(), time.monotonic()
print("x", flush=True)
while not clock.resumed_within(60.0) and time.monotonic() - real < 60:
    time.sleep(0.02)
print(clock.now() - begin, time.monotonic() - real)
"""


def test_only_gaps_are_left_out():
    times = iter([0.0, 0.5, 1.0, 400.0, 400.5, 402.0, 402.5, 402.6, 408.0, 408.0])
    clock = RunningClock(lambda: next(times))
    assert [clock.now() for _ in range(5)] == [0.5, 1.0, 1.0, 1.5, 3.0]
    assert clock.resumed_within(10.0) and GAP_SECONDS < 5.4
    assert not RunningClock().resumed_within(1e9)
    assert clock.now() == 3.5


def test_a_stopped_process_has_not_seen_the_time_pass():
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(writing, 1)
        os.execv(sys.executable, [sys.executable, "-c", _COUNT])
    os.close(writing)
    with os.fdopen(reading) as stream:
        assert stream.readline() == "x\n"
        os.kill(child, signal.SIGSTOP)
        time.sleep(1.5)
        os.kill(child, signal.SIGCONT)
        seen, real = map(float, stream.read().split())
    os.waitpid(child, 0)
    assert real > 1.4 and seen < real - 1.2
