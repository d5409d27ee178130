"""Real rank processes that start in a fraction of a second: forked from one that has imported all.

A rank here is what `launch/pretrain.py` runs, in a process of its own that can be killed, stopped
and signalled; its standard error goes to a file.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.dist import free_port
from tests.forkserver import context


def start(
    flags: Sequence[str],
    world: int,
    log: Path,
    environment: dict[str, str] | None = None,
    more: dict[int, list[str]] | None = None,
) -> list[BaseProcess]:
    """Start the ranks of a run; rank r writes to `log` with `.r` added.

    Args:
        environment: variables of all ranks.
        more: flags of single ranks.
    """
    port = free_port()
    ranks = []
    for rank in range(world):
        variables = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "DS_ACCELERATOR": "cpu",
            "TORCH_CPP_LOG_LEVEL": "ERROR",
            **(environment or {}),
        }
        target = Path(f"{log}.{rank}")
        own = [*flags, *(more or {}).get(rank, [])]
        ranks.append(context().Process(target=serve, args=(own, variables, str(target))))
        ranks[-1].start()
    return ranks


def wait(ranks: Sequence[BaseProcess], timeout: float = 120.0) -> list[int | None]:
    """Exit codes (negative: killed by that signal); a rank that outlasts the timeout is killed."""
    end = time.monotonic() + timeout
    for rank in ranks:
        rank.join(max(end - time.monotonic(), 0.01))
    codes = [rank.exitcode for rank in ranks]
    for rank in ranks:
        if rank.exitcode is None:
            rank.kill()
            rank.join()
    return codes


def run(
    flags: Sequence[str], world: int, log: Path, environment: dict[str, str] | None = None
) -> list[int | None]:
    """Start and wait."""
    return wait(start(flags, world, log, environment))


def serve(
    flags: list[str],
    variables: dict[str, str],
    log_path: str,
    before: Callable[[], object] = lambda: None,
) -> None:
    """Be a rank, in a process of its own; never returns.

    Args:
        before: called after all imports.
    """
    # First of all, as the launcher script does; the log's existence tells that it is done.
    from megasparse.distributed.signals import StopRequest

    stop = StopRequest().install()
    descriptor = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(variables)
    import torch

    from megasparse import log
    from megasparse.distributed.environment import attempt, settle_environment
    from megasparse.distributed.start_notes import StartNotes
    from megasparse.errors import MegasparseError
    from megasparse.preflight.settings import prepare
    from megasparse.train.main import main

    torch.set_num_threads(1)
    before()
    log.setup(int(variables.get("RANK", 0)))
    notes = None
    try:
        rank, world = settle_environment()
        run_dir = flags[flags.index("--run-dir") + 1]
        notes = StartNotes(Path(run_dir), rank, attempt())
        notes.clear()
        code = main(prepare(flags, world), stop, notes)
    except MegasparseError as error:
        message = f"{type(error).__name__}: {error}"
        log.logger.error("%s", message)
        if notes is not None:
            notes.leave(message, error.exit_code)
        code = error.exit_code
    sys.stderr.flush()
    os._exit(code)
