"""A pool of processes that keeps the order of its items and notices a dead worker, always.

The standard pools do not: `multiprocessing.Pool` waits for ever for a killed worker's result, and
so does `ProcessPoolExecutor` when the kill falls into the middle of a write, because its workers
share one pipe, where the rest of the message never comes and the end of the file neither. Here
each worker has a pipe of its own, so that its death is an end of file, for the parent and, when
the parent dies, for the worker.
"""

from __future__ import annotations

import multiprocessing
import queue
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

from megasparse.errors import DataError, MegasparseError

# Items per worker that are read ahead.
IN_FLIGHT = 4


class _Worker:
    """One process and the parent's end of its pipe; it answers one item at a time."""

    def __init__(self, setup: Callable, arguments: tuple) -> None:
        # A child of "spawn" shares nothing with the parent's threads, and no other worker's pipe.
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, setup, arguments), daemon=True)
        self._process.start()
        other.close()  # the worker's copy is the last: when it dies, reading here ends

    def receive(self) -> Any:
        """The next answer; the first one says that `setup` is done."""
        try:
            answer = self._connection.recv()
        except (EOFError, OSError):
            raise self._died() from None
        if isinstance(answer, MegasparseError):
            raise answer
        return answer

    def run(self, item: Any) -> Any:
        try:
            self._connection.send(item)
        except OSError:
            raise self._died() from None
        return self.receive()

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        self._process.join()
        self._connection.close()

    def _died(self) -> DataError:
        self._process.join()
        return DataError(
            f"a worker process died (exit code {self._process.exitcode}); was it killed, or is "
            "the memory too small?"
        )


@contextmanager
def ordered_map(
    setup: Callable[..., Callable[[Any], Any]], arguments: tuple, num_workers: int
) -> Iterator[Callable[[Iterable], Iterator]]:
    """Start worker processes; gives a `map` whose results come in the order of the items.

    Args:
        setup: called as `setup(*arguments)` in each worker, returns the function to apply.
            Importable by name, like all that is handed to another process.
        arguments: of `setup`.
        num_workers: number of processes.

    Raises:
        DataError: a worker died. Errors of megasparse in `setup` or in the function are raised
            here again; any other error is a bug, whose traceback the dying worker prints.
    """
    workers: list[_Worker] = []
    threads = ThreadPoolExecutor(num_workers)  # one a worker: it sends, then waits for the answer
    try:
        for _ in range(num_workers):
            workers.append(_Worker(setup, arguments))
        idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in workers:
            worker.receive()
            idle.put(worker)

        def run(item: Any) -> Any:
            worker = idle.get()
            try:
                return worker.run(item)
            finally:
                idle.put(worker)

        yield lambda items: _in_order(threads, run, items, IN_FLIGHT * num_workers)
    finally:
        for worker in workers:
            worker.kill()  # it keeps nothing, and it may be in the middle of an item
        threads.shutdown(wait=True, cancel_futures=True)
        for worker in workers:
            worker.close()


def _in_order(
    threads: ThreadPoolExecutor, run: Callable[[Any], Any], items: Iterable, window: int
) -> Iterator:
    pending: deque[Future] = deque()
    for item in items:
        pending.append(threads.submit(run, item))
        if len(pending) >= window:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _serve(connection: Connection, setup: Callable, arguments: tuple) -> None:
    """A worker's life; ends with the parent's end of the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and ends the workers
    function: Callable | None = None
    answer: Any = None
    try:
        function = setup(*arguments)
    except MegasparseError as error:
        answer = error
    while True:
        try:
            connection.send(answer)
            if function is None:
                return
            item = connection.recv()
        except (EOFError, OSError):  # the parent has ended, perhaps in the midst of a message
            return
        try:
            answer = function(item)
        except MegasparseError as error:
            answer = error
