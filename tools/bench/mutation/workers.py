"""Forks that answer questions, one at a time each, so that all cores are busy.

A fork has what its parent had imported when it was made. The parent hands out the questions in
their order; each goes to the next fork that is free and of the kind that the question needs.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection, wait
from typing import Any


class Worker:
    """One fork.

    Args:
        answer: computes an answer (picklable) in the fork; a failure ends the whole work.
    """

    def __init__(self, answer: Callable[[Any], Any]) -> None:
        ours, theirs = multiprocessing.Pipe()
        sys.stdout.flush()
        parent, self.process = os.getpid(), os.fork()
        if self.process == 0:
            ours.close()
            _serve(answer, theirs, parent)
        theirs.close()
        self.pipe = ours

    def end(self) -> None:
        """The fork ends, whatever it does."""
        self.pipe.close()
        os.kill(self.process, signal.SIGKILL)
        os.waitpid(self.process, 0)


def _serve(answer: Callable[[Any], Any], pipe: Connection, parent: int) -> None:
    try:
        while os.getppid() == parent:
            if pipe.poll(1.0):
                pipe.send((True, answer(pipe.recv())))
    except BaseException:
        with contextlib.suppress(OSError):
            pipe.send((False, traceback.format_exc()))
    finally:
        os._exit(0)


def ask(
    workers: list[Worker],
    questions: Iterable[Any],
    told: Callable[[Any, Any], object],
    busy: int,
    fits: Callable[[Any, Worker], bool] = lambda question, worker: True,
    until: float = float("inf"),
) -> None:
    """Hand out questions in their order, and tell each answer as it comes.

    Args:
        told: gets a question and its answer.
        busy: how many workers answer at once, at most.
        fits: whether a worker can answer a question; one at least can.
        until: by `time.monotonic()`; nothing is handed out later. What was is waited for, so that
            questions that take long are not missing more often than others.
    """
    asked: dict[Any, tuple[Worker, Any]] = {}
    free, waiting = list(workers), list(questions)
    while True:
        for question in list(waiting):
            fitting = [worker for worker in free if fits(question, worker)]
            if len(asked) >= busy or time.monotonic() >= until:
                break
            if fitting:
                waiting.remove(question)
                free.remove(fitting[0])
                fitting[0].pipe.send(question)
                asked[fitting[0].pipe] = fitting[0], question
        if not asked:
            return
        for pipe in wait(list(asked)):
            worker, question = asked.pop(pipe)
            answered, answer = worker.pipe.recv()
            if not answered:
                raise SystemExit(f"a worker failed:\n{answer}")
            free.append(worker)
            told(question, answer)
