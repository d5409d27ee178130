"""Rank-aware logging: one logger for the package, lines from rank 0 unless a rank has trouble.

A line goes above the bars that a terminal shows.
"""

from __future__ import annotations

import logging
import shutil
import sys
import textwrap

from megasparse.progress import above_bars

logger = logging.getLogger("megasparse")
COMMAND = "    "  # before a line to copy, which stays whole
_first_rank = False  # once `setup` was called


class _LineHandler(logging.StreamHandler):
    def emit(self, record: logging.LogRecord) -> None:
        with above_bars():
            super().emit(record)


class _RankFormatter(logging.Formatter):
    """Lines with the time, and the rank's number where there is trouble.

    Args:
        width: of the terminal: longer lines go on below, between words; None: lines stay whole.
    """

    def __init__(self, rank: int, width: int | None = None) -> None:
        super().__init__("%(asctime)s %(message)s", datefmt="%H:%M:%S")
        self._rank, self._width = rank, width

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        if record.levelno >= logging.WARNING:
            line = f"[rank {self._rank}] {record.levelname.lower()}: {line}"
        if self._width is None:
            return line
        return "\n".join(_folded(part, self._width) for part in line.split("\n"))


def _folded(line: str, width: int) -> str:
    if len(line) <= width or line.startswith(COMMAND):
        return line
    indent = " " * (len(line) - len(line.lstrip()) or len("00:00:00 "))
    return "\n".join(
        textwrap.wrap(
            line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        )
    )


def setup(rank: int, level: str = "info") -> None:
    """Send the package's messages to stderr: rank 0's of a level, warnings and worse of the others.

    Args:
        level: debug, info, warning or error.
    """
    handler = _LineHandler(sys.stderr)
    width = shutil.get_terminal_size().columns if sys.stderr.isatty() else None
    handler.setFormatter(_RankFormatter(rank, width))
    global _first_rank
    _first_rank = rank == 0
    logger.handlers[:] = [handler]
    logger.propagate = False
    least = getattr(logging, level.upper())
    logger.setLevel(least if rank == 0 else max(least, logging.WARNING))


def is_logging_rank() -> bool:
    """Whether this rank shows progress and info messages: rank 0, once `setup` was called."""
    return logger.isEnabledFor(logging.INFO)


_said: set[str] = set()


def log_once(message: str, *values: object) -> None:
    """An info line, the first time that it is asked for with these values."""
    _once(logging.INFO, message % values)


def warn_once(message: str, *values: object) -> None:
    """A warning, likewise; from the first rank alone, for it is the same on all."""
    if _first_rank or is_logging_rank():
        _once(logging.WARNING, message % values)


def _once(level: int, line: str) -> None:
    if line not in _said:
        _said.add(line)
        logger.log(level, "%s", line)
