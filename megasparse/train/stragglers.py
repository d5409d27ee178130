"""Which rank is slow: its own work in a step against that of its peers, and a warning that stays.

In a step all ranks take the same time: the fast ones wait in collectives for the slow one. What
differs is the work of their own, without communication. Ranks of one pipeline stage have the same
work to do, so they are compared with each other.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from megasparse.log import logger

OWN_WORK = ("data", "forward", "backward", "optimizer", "preparation")
SLOW = 1.3  # times the median of the stage
IN_A_ROW = 3  # log steps before it is told


class Slowest(NamedTuple):
    """The rank that stands out most, and its time over the median of its stage."""

    rank: int
    ratio: float


def slowest(seconds: Sequence[float], ranks_of_stage: int) -> Slowest | None:
    """The slowest rank compared with its stage; None where nothing was measured.

    Args:
        seconds: own work of every rank in a step.
        ranks_of_stage: ranks of one pipeline stage, which follow each other.
    """
    found: Slowest | None = None
    for first in range(0, len(seconds), ranks_of_stage):
        stage = seconds[first : first + ranks_of_stage]
        median = statistics.median_low(stage)
        if median <= 0:
            continue
        place = max(range(len(stage)), key=stage.__getitem__)
        ratio = stage[place] / median
        if found is None or ratio > found.ratio:
            found = Slowest(first + place, ratio)
    return found


class StragglerWatch:
    """Tells of a rank that is slow at several log steps in a row, once for each."""

    def __init__(self) -> None:
        self._rank, self._count = -1, 0
        self._told: set[int] = set()

    def look(self, step: int, found: Slowest | None) -> None:
        """After a log step."""
        if found is None or found.ratio < SLOW:
            self._count = 0
            return
        self._count = self._count + 1 if found.rank == self._rank else 1
        self._rank = found.rank
        if self._count >= IN_A_ROW and found.rank not in self._told:
            self._told.add(found.rank)
            logger.warning(
                "step %d: rank %d is slow: its own work takes %.2f times the median of its stage, "
                "at %d log steps in a row",
                step,
                found.rank,
                found.ratio,
                self._count,
            )
