"""Run functions on several gloo ranks: `run(function, world_size, *args)`.

A function gets `(rank, world, *args)` and returns something picklable; the caller gets the list of
results by rank. A failure on any rank raises here with that rank's traceback, and ends the others;
so does a rank that does not answer in time. Ranks are processes of their own, on the CPU.
"""

from __future__ import annotations

import os
import random
import socket
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from tests.forkserver import context

TIMEOUT_S = 240.0


def run(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """`[function(rank, world_size, *args) for each rank]`, in processes that form a gloo group."""
    with tempfile.TemporaryDirectory(prefix="megasparse-ranks-") as folder:
        processes, pipes = [], []
        for rank in range(world_size):
            ours, theirs = context().Pipe()
            process = context().Process(
                target=_serve, args=(rank, world_size, f"{folder}/store", theirs), daemon=True
            )
            process.start()
            theirs.close()
            processes.append(process)
            pipes.append(ours)
        try:
            for pipe in pipes:
                pipe.send((function, args))
            return _answers(pipes)
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join()


def _answers(pipes: list[Connection]) -> list[Any]:
    """One answer of every rank, by rank; the first failure is raised at once."""
    results: dict[int, tuple[bool, Any]] = {}
    while len(results) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(waiting, timeout=TIMEOUT_S)
        if not ready:
            missing = [rank for rank in range(len(pipes)) if rank not in results]
            raise TimeoutError(f"ranks {missing} gave no answer within {TIMEOUT_S} s")
        for rank, pipe in enumerate(pipes):
            if pipe not in ready:
                continue
            try:
                results[rank] = pipe.recv()
            except EOFError:
                raise RuntimeError(f"rank {rank} died") from None
            if not results[rank][0]:
                raise RuntimeError(f"rank {rank} failed:\n{results[rank][1]}")
    return [results[rank][1] for rank in range(len(pipes))]


def free_port() -> int:
    """A port that nothing listens on, from below those that the kernel hands out by itself.

    One of theirs may be given to a connection of another test before it is used.
    """
    while True:
        port = random.randrange(20000, 32000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


def _serve(rank: int, world: int, store: str, pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", TORCH_GLOO_LAZY_INIT="1")
    torch.set_num_threads(1)
    try:
        function, args = pipe.recv()
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
        answer = (True, function(rank, world, *args))
    except BaseException:
        answer = (False, traceback.format_exc())
    pipe.send(answer)
    pipe.poll(None)  # nobody leaves before all have answered; then the caller ends all
