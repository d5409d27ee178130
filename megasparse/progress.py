"""Progress bars: a bar on a terminal, one line every few seconds in a log file.

The only module that imports tqdm. In a log (standard error is not a terminal) a bar drawn with
carriage returns is unreadable, so there each refresh is a line of its own, and work that ends
before the first interval prints nothing.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

try:
    from tqdm import tqdm
except ImportError:  # not in a torch-only installation: work is done without a bar
    tqdm = None

LOG_INTERVAL_SECONDS = 5.0

# tqdm's lock is shared with forked processes, and one that is killed while it holds it would stop
# all others for ever; its monitor thread could be holding it at any fork. A bar here is drawn by
# one process, so a lock of its threads is enough.
if tqdm is not None:
    tqdm.set_lock(threading.RLock())
    tqdm.monitor_interval = 0


class _NoProgress:
    """The same calls without a bar."""

    def __init__(self, iterable: Iterable | None) -> None:
        self._iterable = iterable

    def __iter__(self) -> Iterator[Any]:
        return iter(self._iterable or ())

    def __enter__(self) -> _NoProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, n: float = 1) -> None:
        """Nothing is shown."""

    def close(self) -> None:
        """Nothing is open."""


class _LogProgress(tqdm or object):  # type: ignore[misc]
    """tqdm that ends each refresh with a newline in place of overwriting the line before."""

    @staticmethod
    def status_printer(file: TextIO):
        def write(text: str) -> None:
            if text.strip():
                file.write(text.strip() + "\n")
                file.flush()

        return write


@contextmanager
def above_bars() -> Iterator[None]:
    """Within it lines can be written to a terminal; its bars are drawn again below them."""
    if all(isinstance(bar, _LogProgress) for bar in getattr(tqdm, "_instances", ())):
        yield
        return
    with tqdm.external_write_mode(file=sys.stderr):
        yield


def _has_width(stream: TextIO) -> bool:
    try:
        return os.get_terminal_size(stream.fileno()).columns > 0
    except (OSError, ValueError):  # no file behind it
        return False


def progress(
    iterable: Iterable | None = None,
    *,
    desc: str,
    total: float | None = None,
    unit: str = "it",
    enabled: bool = True,
    stream: TextIO | None = None,
    leave: bool = True,
) -> Any:
    """A tqdm bar over `iterable`, or a manual one (`.update(n)`, `.close()`, context manager).

    Args:
        iterable: what to iterate; None for a bar that the caller updates.
        desc: what is being done.
        total: amount of work in `unit`s; taken from `len(iterable)` when that exists.
        unit: name of the unit; "B" counts bytes in powers of 1024.
        enabled: False on the ranks that should stay silent.
        stream: where to write, standard error unless given.
        leave: False takes the bar off a terminal when it has ended.
    """
    if tqdm is None:
        return _NoProgress(iterable)
    stream = sys.stderr if stream is None else stream
    common: dict[str, Any] = {
        "desc": desc,
        "total": total,
        "unit": unit,
        "unit_scale": unit == "B",
        "unit_divisor": 1024,
        "file": stream,
        "disable": not enabled,
        "leave": leave,
    }
    if stream.isatty():
        # A terminal without a size (0 columns: `script`, some containers) would get empty lines.
        width: dict[str, Any] = {"dynamic_ncols": True} if _has_width(stream) else {"ncols": 80}
        return tqdm(iterable, **width, **common)
    return _LogProgress(
        iterable,
        ncols=100,
        mininterval=LOG_INTERVAL_SECONDS,
        maxinterval=LOG_INTERVAL_SECONDS,
        delay=LOG_INTERVAL_SECONDS,
        **common,
    )
