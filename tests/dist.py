"""Run functions on several gloo ranks: `run(function, world_size, *args)`.

Starting a rank costs seconds of imports, so ranks stay alive: one pool a world size, shared by the
whole session. A function gets `(rank, world, *args)` and returns something picklable; the caller
gets the list of results by rank. A failure on any rank raises here with that rank's traceback, and
a rank that does not answer in time ends the pool, so the next test starts with fresh ranks.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

TIMEOUT_S = 240.0


class _Pool:
    def __init__(self, world: int) -> None:
        context = multiprocessing.get_context("spawn")
        handle, self._store = tempfile.mkstemp(prefix="megasparse-ranks-")
        os.close(handle)
        os.unlink(self._store)
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
        for pipe in self._pipes:
            pipe.send((function, args))
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
        if os.path.exists(self._store):
            os.unlink(self._store)


_pools: dict[int, _Pool] = {}


def run(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """`[function(rank, world_size, *args) for each rank]`, in processes that form a gloo group."""
    if world_size not in _pools:
        _pools[world_size] = _Pool(world_size)
    try:
        return _pools[world_size].run(function, args)
    except BaseException:
        # The ranks may be in the middle of a collective: none of them can be used again.
        _pools.pop(world_size).stop()
        raise


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
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            answer = (True, function(rank, world, *args))
        except BaseException:
            answer = (False, traceback.format_exc())
        pipe.send(answer)
