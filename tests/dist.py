"""Run functions on several gloo ranks: `run(function, world_size, *args)`.

Starting a rank costs seconds of imports, so ranks stay alive: one pool a world size, shared by the
whole session. A function gets `(rank, world, *args)` and returns something picklable; the caller
gets the list of results by rank. A failure on any rank raises here with that rank's traceback, and
a rank that does not answer in time ends the pool, so the next test starts with fresh ranks.

Each function gets a process group of its own: what it leaves behind (dozens of groups, each with
threads that do not sleep) would slow down everything after it.
"""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import random
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

TIMEOUT_S = 240.0

# Functions that a pool runs before it is replaced: DeepSpeed's pipeline engines are never freed.
RUNS = 16

# gloo now and then loses a connection when process groups follow one another quickly. Ranks that
# never met have run nothing of the function: it is tried again on fresh ones.
ATTEMPTS = 3

# Where DeepSpeed keeps groups beyond the engine that made them.
_REMEMBERED = {
    "deepspeed.utils.groups": ("_WORLD_GROUP", "mpu"),
    "deepspeed.runtime.pipe.p2p": ("_grid",),
}


class _NeverMet(RuntimeError):
    """The ranks could not form a process group."""


class _Pool:
    def __init__(self, world: int) -> None:
        context = multiprocessing.get_context("spawn")
        handle, self._store = tempfile.mkstemp(prefix="megasparse-ranks-")
        os.close(handle)
        os.unlink(self._store)
        self.runs = 0
        self._processes = []
        self._pipes: list[Connection] = []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, world, self._store, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def run(self, function: Callable[..., Any], args: tuple[Any, ...]) -> list[Any]:
        self.runs += 1
        for pipe in self._pipes:
            pipe.send((function, args))
        try:
            self._answers()
        except RuntimeError as error:
            raise _NeverMet(str(error)) from None
        return self._answers()

    def _answers(self) -> list[Any]:
        """One answer of every rank, by rank; the first failure is raised at once."""
        results: dict[int, tuple[bool, Any]] = {}
        while len(results) < len(self._pipes):
            waiting = [p for rank, p in enumerate(self._pipes) if rank not in results]
            ready = wait(waiting, timeout=TIMEOUT_S)
            if not ready:
                missing = [r for r in range(len(self._pipes)) if r not in results]
                raise TimeoutError(f"ranks {missing} gave no answer within {TIMEOUT_S} s")
            for pipe in ready:
                rank = self._pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    results[rank] = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    raise RuntimeError(f"rank {rank} died") from None
                if not results[rank][0]:
                    raise RuntimeError(f"rank {rank} failed:\n{results[rank][1]}")
        return [results[rank][1] for rank in range(len(self._pipes))]

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        folder, prefix = os.path.split(self._store)
        for name in os.listdir(folder):
            if name.startswith(prefix):
                os.unlink(os.path.join(folder, name))


_pools: dict[int, _Pool] = {}


def run(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """`[function(rank, world_size, *args) for each rank]`, in processes that form a gloo group."""
    if world_size in _pools and _pools[world_size].runs >= RUNS:
        _pools.pop(world_size).stop()
    for attempt in range(ATTEMPTS):
        if world_size not in _pools:
            _pools[world_size] = _Pool(world_size)
        try:
            return _pools[world_size].run(function, args)
        except BaseException as error:
            # The ranks may be in the middle of a collective: none of them can be used again.
            _pools.pop(world_size).stop()
            if not isinstance(error, _NeverMet) or attempt == ATTEMPTS - 1:
                raise
    raise AssertionError("unreachable")


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


@atexit.register
def _stop_all() -> None:
    for pool in _pools.values():
        pool.stop()
    _pools.clear()


def _serve(rank: int, world: int, store: str, pipe: Connection) -> None:
    import torch.distributed as dist

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", DS_ACCELERATOR="cpu")
    import torch

    torch.set_num_threads(1)
    number = 0
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        number += 1
        join = f"file://{store}.{number}"
        try:
            dist.init_process_group("gloo", init_method=join, rank=rank, world_size=world)
            dist.barrier()  # a function that ends at once must not leave while others connect
        except RuntimeError:
            pipe.send((False, traceback.format_exc()))
            return
        pipe.send((True, None))
        try:
            answer = (True, function(rank, world, *args))
        except BaseException:
            answer = (False, traceback.format_exc())
        else:
            _leave()
        pipe.send(answer)


def _leave() -> None:
    """End all process groups, and make DeepSpeed and Megatron forget them."""
    import torch.distributed as dist

    for module, names in _REMEMBERED.items():
        for name in names if module in sys.modules else ():
            setattr(sys.modules[module], name, None)
    if "megatron.core.parallel_state" in sys.modules:
        sys.modules["megatron.core.parallel_state"].destroy_model_parallel()
    dist.destroy_process_group()
    gc.collect()  # a group's threads end with its last reference
