"""Stopping at a step boundary: signals and time limits of this rank.

A handler only stores the signal's number, since it may run at any moment, also while files are
written or the model is built. The loop reads it after every step; the ranks decide together, save
once and leave with exit code 75. This module is light to import, so that the handlers are in place
before anything heavy is loaded.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class StoppedEarly(Exception):
    """A signal came before the ranks had met: there is no step to save.

    Args:
        reason: the signal's name.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"stopped before the ranks had met ({reason}); there is nothing to save")


class StopRequest:
    """The reasons to stop that this rank has seen.

    Args:
        started: time.monotonic() at the start of the process.
    """

    def __init__(self, started: float | None = None) -> None:
        self._started = time.monotonic() if started is None else started
        self._signal: int | None = None
        self._at_once: Callable[[], object] | None = None

    def install(self) -> StopRequest:
        """Handle the signals from now on (main thread)."""
        handle(self._note)
        return self

    def no_more(self) -> None:
        """The run is over and saved: a signal now must not change its exit code."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def raise_if_asked(self) -> None:
        """For waits before the ranks have met.

        Raises:
            StoppedEarly: a signal has come.
        """
        if self._signal is not None:
            raise StoppedEarly(describe(self._signal))

    @contextmanager
    def at_once(self, leave: Callable[[StoppedEarly], object]) -> Iterator[None]:
        """A block in which nothing is worth to be finished, such as imports that take seconds.

        Args:
            leave: ends the process; called by the handler, or now if a signal has come already.
        """
        self._at_once = lambda: leave(StoppedEarly(describe(self._signal or signal.SIGTERM)))
        if self._signal is not None:
            self._at_once()
        try:
            yield
        finally:
            self._at_once = None

    def _note(self, number: int, _: FrameType | None) -> None:
        self._signal = self._signal or number
        if self._at_once is not None:
            self._at_once()

    def reason(self, exit_duration_in_mins: float | None) -> int:
        """0: go on; a signal's number; or -1 when the time is over."""
        if self._signal is not None:
            return self._signal
        if exit_duration_in_mins is not None:
            minutes = (time.monotonic() - self._started) / 60.0
            return -1 if minutes >= exit_duration_in_mins else 0
        return 0


def handle(handler: Callable[[int, FrameType | None], object]) -> None:
    """Have the signals that ask a run to stop handled; SIGHUP not under `nohup`, which ignores it.

    Args:
        handler: called with the signal's number and the frame, in the main thread.
    """
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def describe(reason: int) -> str:
    """A reason in words."""
    return "--exit-duration-in-mins is over" if reason < 0 else signal.Signals(reason).name


def ignore_signals(_: int = 0) -> None:
    """For worker processes of a rank: the rank decides when they end."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
