"""Ranks decide together: values of all, the largest of all, and an error of one on all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megasparse.distributed.control_plane import ControlPlane, tree
from megasparse.errors import ConfigError, MegasparseError, one_line
from tests import dist


def _refuse(rank: int) -> str:
    if rank:
        raise ConfigError(f"found {rank}")
    return "fine"


def _decisions(rank: int, world: int) -> list[Any]:
    import torch

    from megasparse.distributed.control_plane import make_control_plane

    control = make_control_plane()
    control.barrier()
    found: list[Any] = [
        control.gather({"rank": rank, "text": "x" * rank}),
        control.max_over_ranks([rank, -rank]),
        control.on_rank_zero(lambda: f"of rank {rank}"),
        control.sum_over_ranks([rank, 1]),
        control.first(None if rank < world - 1 else {"last": rank}),
    ]
    collected = control.collect(10 * rank)
    assert collected == (None if rank else [10 * r for r in range(world)])
    to_all = {other: [[rank, other]] for other in range(world)} | {0: [rank, "twice"]}
    come = control.exchange(to_all)
    expected = (
        [*range(world), *["twice"] * world]
        if rank == 0
        else [[other, rank] for other in range(world)]
    )
    assert sorted(map(str, come)) == sorted(map(str, expected))
    assert control.exchange({(rank + 1) % world: ["next"]}) == ["next"]
    sizes = {other: 3 * other for other in range(world) if other != rank}
    rooms = {other: torch.empty(size, dtype=torch.uint8) for other, size in sizes.items()}
    content = torch.full((3 * rank,), rank, dtype=torch.uint8)
    for other, received in control.swap(dict.fromkeys(sizes, content), rooms).items():
        assert received.tolist() == [other] * 3 * other
    for work in (lambda: _refuse(rank), Path(f"/nowhere/{rank}").read_text):
        try:
            control.on_all_ranks(work)
        except MegasparseError as error:
            found.append((type(error).__name__, str(error)))
    return found


@pytest.mark.parametrize("world", [2, 5])
def test_every_rank_gets_the_same(world):
    for found in dist.run(_decisions, world):
        assert found == [
            [{"rank": rank, "text": "x" * rank} for rank in range(world)],
            [world - 1, 0],
            "of rank 0",
            [world * (world - 1) // 2, world],
            {"last": world - 1},
            ("ConfigError", "rank 1: found 1"),
            ("StorageError", "rank 0: /nowhere/0: No such file or directory"),
        ]


def test_one_rank_alone_needs_no_group():
    control = ControlPlane(None)
    control.barrier()
    assert control.exchange({0: ["a", 1]}) == ["a", 1] and control.exchange({}) == []
    assert control.gather("a") == ["a"] and control.max_over_ranks([3]) == [3]
    assert control.on_rank_zero(lambda: 5) == 5


def test_an_error_is_one_line():
    assert one_line(ValueError("a\n  b")) == "a b" and one_line(ValueError()) == "ValueError"
    assert one_line(FileNotFoundError(2, "No such file", "x")) == "x: No such file"


@pytest.mark.parametrize("world", [1, 2, 3, 7, 8, 100, 16_384])
def test_the_tree_has_all_ranks_in_order_and_few_levels(world):
    """Collected values come in the order of the ranks, over log N connections a rank."""
    places = [tree(rank, world) for rank in range(world)]
    for rank, (parent, children) in enumerate(places):
        assert len(children) + 1 <= max(world - 1, 1).bit_length() + 1
        assert all(places[child][0] == rank for child in children)
        assert (parent is None) == (rank == 0)

    def subtree(rank: int) -> list[int]:
        return [rank, *(r for child in places[rank][1] for r in subtree(child))]

    assert subtree(0) == list(range(world))
