"""Ranks decide together: values of all, the largest of all, and an error of one on all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megasparse.distributed.control_plane import ControlPlane
from megasparse.errors import ConfigError, MegasparseError, one_line
from tests import dist


def _refuse(rank: int) -> str:
    if rank:
        raise ConfigError(f"found {rank}")
    return "fine"


def _decisions(rank: int, world: int) -> list[Any]:
    from megasparse.distributed.control_plane import make_control_plane

    control = make_control_plane()
    control.barrier()
    found: list[Any] = [
        control.gather({"rank": rank, "text": "x" * rank}),
        control.max_over_ranks([rank, -rank]),
        control.on_rank_zero(lambda: f"of rank {rank}"),
        control.on_all_ranks(lambda: 10 * rank),
    ]
    for work in (lambda: _refuse(rank), Path(f"/nowhere/{rank}").read_text):
        try:
            control.on_all_ranks(work)
        except MegasparseError as error:
            found.append((type(error).__name__, str(error)))
    return found


def test_every_rank_gets_the_same():
    for found in dist.run(_decisions, 2):
        assert found == [
            [{"rank": 0, "text": ""}, {"rank": 1, "text": "x"}],
            [1, 0],
            "of rank 0",
            [0, 10],
            ("ConfigError", "rank 1: found 1"),
            ("StorageError", "rank 0: /nowhere/0: No such file or directory"),
        ]


def test_one_rank_alone_needs_no_group():
    control = ControlPlane(None)
    control.barrier()
    assert control.gather("a") == ["a"] and control.max_over_ranks([3]) == [3]
    assert control.on_rank_zero(lambda: 5) == 5


def test_an_error_is_one_line():
    assert one_line(ValueError("a\n  b")) == "a b" and one_line(ValueError()) == "ValueError"
    assert one_line(FileNotFoundError(2, "No such file", "x")) == "x: No such file"
