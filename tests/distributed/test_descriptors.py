"""Open files: the need of a rank, the limit that is raised, and the words when it is too low."""

from __future__ import annotations

import errno
import resource

import pytest

from megasparse.distributed import descriptors
from megasparse.distributed.control_plane import tree
from megasparse.distributed.verdicts import is_communication_error
from megasparse.errors import ConfigError
from tests import dist


@pytest.fixture
def limits(monkeypatch):
    """The process's limits, as a pair that can be set without touching the process."""
    pair = [1024, 4096]
    monkeypatch.setattr(resource, "getrlimit", lambda _: tuple(pair))
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: pair.__setitem__(slice(None), new))
    return pair


def test_the_soft_limit_becomes_the_hard_one(limits):
    descriptors.require(0, 64)
    assert limits == [4096, 4096]
    limits[:] = [-1, -1]  # none
    descriptors.require(0, 16_384)


def test_too_few_are_named_with_what_to_do(limits):
    descriptors.require(1, 16_384)  # the others need few
    with pytest.raises(ConfigError, match=r"rank 0 may have 4096 open .* 16384 ranks.*ulimit"):
        descriptors.require(0, 16_384)


def test_the_need_of_rank_0_is_linear_and_that_of_the_others_logarithmic():
    worlds = [8, 256, 1024, 16_384]
    assert [descriptors.needed(0, n) - descriptors.needed(1, n) for n in worlds] == [
        2 * n for n in worlds
    ]
    assert descriptors.needed(1, 16_384) - descriptors.needed(1, 8) <= 8 * 11


def test_exhausted_descriptors_are_no_lost_peer():
    text = "gloo::EnforceNotMet: socket: Too many open files"
    assert descriptors.is_exhausted(RuntimeError(text))
    assert not is_communication_error(RuntimeError(text))
    assert descriptors.is_exhausted(OSError(errno.EMFILE, "Too many open files"))
    assert not descriptors.is_exhausted(RuntimeError("Connection reset by peer"))


def _sockets(rank: int, world: int) -> tuple[int, int]:
    """Open files that the control plane adds, with nothing but decisions."""
    import os

    from megasparse.distributed.control_plane import make_control_plane

    before = len(os.listdir("/proc/self/fd"))
    control = make_control_plane()
    for _ in range(2):
        control.max_over_ranks([rank])
        control.on_rank_zero(lambda: 1)
        control.gather(rank)
    return before, len(os.listdir("/proc/self/fd")) - before


def test_a_rank_is_connected_along_the_tree_alone():
    """Of 12 ranks a full mesh would add 11 sockets to each."""
    for rank, (_, added) in enumerate(dist.run(_sockets, 12)):
        parent, children = tree(rank, 12)
        # gloo itself opens four: a listener, and what its loop waits at.
        assert added <= 4 + len(children) + (parent is not None), rank
