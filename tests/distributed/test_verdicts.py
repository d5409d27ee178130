"""Which rank is at fault, from beats written by hand."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch.distributed as dist

from megasparse.distributed.verdicts import (
    GRACE_SECONDS,
    Verdict,
    hang,
    is_communication_error,
    longest,
    place_of,
)
from megasparse.errors import PeerError


def _beat(ticks: int, late: bool = True, collective: str | None = None) -> dict[str, Any]:
    return {
        "ticks": ticks,
        "late": late,
        "collective": collective,
        "late_for": 2 * GRACE_SECONDS,
        "phase": "step 7, micro-batch 0",
        "seconds": 61.2,
        "where": "data.py:3 read",
    }


def test_nobody_is_late():
    assert hang([_beat(5, late=False), _beat(5, late=False)]) is None


def test_the_rank_that_waits_for_nobody_hangs():
    verdict = hang([_beat(5, collective="all_reduce"), _beat(6), _beat(7, collective="send")])
    assert verdict == Verdict(
        1,
        "rank 1 hangs in step 7, micro-batch 0 for 61 s at data.py:3 read; others wait in "
        "all_reduce, send",
        PeerError.exit_code,
    )


def test_of_ranks_that_all_wait_the_last_one_hangs():
    beats = [_beat(5, collective="send"), _beat(4, collective="recv")]
    assert hang(beats).rank == 1


def test_a_rank_that_is_about_to_be_late_is_waited_for():
    waiting, busy = _beat(5, collective="all_reduce"), _beat(4, late=False)
    assert hang([waiting, busy]).rank == 0
    waiting["late_for"] = GRACE_SECONDS / 2
    assert hang([waiting, busy]) is None


def test_the_longest_silence_counts():
    short, long = Verdict(1, "a", 71), Verdict(2, "b", 71)
    assert longest([None, (1.0, short), (3.0, long)]) == long
    assert longest([None, None]) is None


def test_a_frame_tells_file_line_and_function():
    here, collective = place_of(sys._getframe())
    assert here.startswith("test_verdicts.py:") and collective is None
    assert here.endswith("test_a_frame_tells_file_line_and_function")
    assert place_of(None) == ("unknown", None)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("Connection reset by peer"), True),
        (dist.DistBackendError("anything"), True),
        (RuntimeError("shapes differ"), False),
        (ValueError("NCCL"), False),
    ],
)
def test_communication_errors_are_told_from_others(error, expected):
    assert is_communication_error(error) == expected
