"""Stopping at a step boundary: signals and time limits of this rank.

A handler only stores the signal's number, since it may run at any moment, also while files are
written or the model is built. The loop reads it after every step; the ranks decide together, save
once and leave with exit code 75. This module is light to import, so that the handlers are in place
before anything heavy is loaded.
"""

from __future__ import annotations

import signal
import time
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """The reasons to stop that this rank has seen.

    Args:
        started: time.monotonic() at the start of the process.
    """

    def __init__(self, started: float | None = None) -> None:
        self._started = time.monotonic() if started is None else started
        self._signal: int | None = None

    def install(self) -> StopRequest:
        """Handle the signals from now on (main thread)."""
        for number in SIGNALS:
            signal.signal(number, self._note)
        return self

    def _note(self, number: int, _: FrameType | None) -> None:
        self._signal = self._signal or number

    def reason(self, exit_duration_in_mins: float | None) -> int:
        """0: go on; a signal's number; or -1 when the time is over."""
        if self._signal is not None:
            return self._signal
        if exit_duration_in_mins is not None:
            minutes = (time.monotonic() - self._started) / 60.0
            return -1 if minutes >= exit_duration_in_mins else 0
        return 0


def describe(reason: int) -> str:
    """A reason in words."""
    return "--exit-duration-in-mins is over" if reason < 0 else signal.Signals(reason).name


def ignore_signals(_: int = 0) -> None:
    """For worker processes of a rank: the rank decides when they end."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
