"""Rank-aware logging: one logger for the package, lines from rank 0 unless a rank has trouble."""

from __future__ import annotations

import logging
import sys

logger = logging.getLogger("megasparse")


class _RankFormatter(logging.Formatter):
    def __init__(self, rank: int) -> None:
        super().__init__("%(asctime)s %(message)s", datefmt="%H:%M:%S")
        self._rank = rank

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        if record.levelno < logging.WARNING:
            return line
        return f"[rank {self._rank}] {record.levelname.lower()}: {line}"


def setup(rank: int) -> None:
    """Send the package's messages to stderr: all of rank 0's, warnings and worse of the others."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_RankFormatter(rank))
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)


def is_logging_rank() -> bool:
    """Whether this rank shows progress and info messages: rank 0, once `setup` was called."""
    return logger.isEnabledFor(logging.INFO)


_said: set[str] = set()


def log_once(message: str, *values: object) -> None:
    """An info line, the first time that it is asked for with these values."""
    _once(logging.INFO, message % values)


def warn_once(message: str, *values: object) -> None:
    """A warning, likewise; from the first rank alone, for it is the same on all."""
    if is_logging_rank():
        _once(logging.WARNING, message % values)


def _once(level: int, line: str) -> None:
    if line not in _said:
        _said.add(line)
        logger.log(level, "%s", line)
