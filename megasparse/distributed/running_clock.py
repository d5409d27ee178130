"""A clock that does not count the time in which this process was stopped.

Slurm's suspend, Ctrl-Z, or a debugger stop all ranks for minutes; by the system's clock all of them
would then have been silent for too long, at the moment in which they go on. Threads that watch ask
for the time several times a second, so a long gap between two questions is a time in which the
process did not run.
(While a laptop's lid is closed the system's own clock stands still.)
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

GAP_SECONDS = 2.0  # a busy machine makes a thread wait, too


class RunningClock:
    """Seconds in which this process ran, from an arbitrary start.

    Args:
        clock: the system's.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._guard = clock, threading.Lock()
        self._asked, self._stopped = clock(), 0.0
        self._resumed: float | None = None

    def now(self) -> float:
        """The time; to be asked at least every `GAP_SECONDS` by some thread."""
        with self._guard:
            now = self._clock()
            gap, self._asked = now - self._asked, now
            if gap > GAP_SECONDS:
                self._stopped += gap
                self._resumed = now
            return now - self._stopped

    def resumed_within(self, seconds: float) -> bool:
        """Whether this process was stopped, and has gone on for no longer than this."""
        self.now()
        with self._guard:
            return self._resumed is not None and self._clock() - self._resumed < seconds
