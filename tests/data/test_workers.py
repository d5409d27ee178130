"""The pool: order, little read ahead, and no way to die that leaves the parent waiting."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import struct
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import pytest

from megasparse.data.workers import IN_FLIGHT, _serve, ordered_map
from megasparse.errors import ConfigError, DataError

# Of this process, and none of these tests'.
BEFORE: set[int | None] = set()


@pytest.fixture(autouse=True)
def _children_of_others() -> None:
    BEFORE.clear()
    BEFORE.update(child.pid for child in multiprocessing.active_children())


def _workers() -> list[int | None]:
    """Ids of child processes that a test has left."""
    return [c.pid for c in multiprocessing.active_children() if c.pid not in BEFORE]


def double_slowly(first_delay: float) -> Callable[[int], int]:
    def work(item: int) -> int:
        if item % 3 == 0:
            time.sleep(first_delay)  # later items are done before this one
        return 2 * item

    return work


def refuse_in_setup() -> Callable:
    raise ConfigError("setup refuses")


def refuse_five() -> Callable[[int], int]:
    def work(item: int) -> int:
        if item == 5:
            raise DataError("five")
        return item

    return work


def die(how: str) -> Callable[[int], bytes]:
    """A function that dies at item 5: killed, killed in the middle of its answer, or by a bug."""

    def work(item: int) -> bytes:
        if item != 5:
            return b"x" * 100
        if how == "a bug":
            raise ZeroDivisionError
        if how == "while writing":
            (pipe,) = [thing for thing in gc.get_objects() if isinstance(thing, Connection)]
            os.write(pipe.fileno(), struct.pack("!i", 1_000_000) + b"begin")
        os.kill(os.getpid(), signal.SIGKILL)
        return b""

    return work


def test_results_keep_the_order_and_reading_stays_near() -> None:
    read = 0

    def items():
        nonlocal read
        for item in range(60):
            read += 1
            yield item

    with ordered_map(double_slowly, (0.02,), 2) as run:
        for written, result in enumerate(run(items())):
            assert result == 2 * written
            assert read - written <= IN_FLIGHT * 2
    assert written == 59
    assert not _workers()


@pytest.mark.parametrize("how", ["before answering", "while writing", "a bug"])
def test_dead_worker_is_an_error(how: str) -> None:
    with (
        pytest.raises(DataError, match="a worker process died"),
        ordered_map(die, (how,), 2) as run,
    ):
        for result in run(range(100)):
            assert result == b"x" * 100
    assert not _workers()


def test_errors_of_the_work_and_of_the_setup_come_back_as_they_are() -> None:
    results = []
    with pytest.raises(DataError, match="^five$"), ordered_map(refuse_five, (), 2) as run:
        for result in run(range(100)):
            results.append(result)
    assert results == [0, 1, 2, 3, 4]
    with pytest.raises(ConfigError, match="setup refuses"), ordered_map(refuse_in_setup, (), 2):
        pass
    assert not _workers()


@pytest.mark.parametrize("written", [b"", struct.pack("!i", 1_000_000) + b"begin"])
def test_a_worker_ends_quietly_with_its_parent(written: bytes) -> None:
    """Also when the parent was killed in the midst of a message."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, double_slowly, (0.0,)))
    process.start()
    theirs.close()
    assert ours.recv() is None  # set up
    os.write(ours.fileno(), written)
    ours.close()
    process.join()
    assert process.exitcode == 0  # a traceback would make it 1
