"""Pre-train a language model with 2:4 sparse linear layers.

    deepspeed launch/pretrain.py --config configs/quickstart.yaml [--flags]
    python -m torch.distributed.run --nproc-per-node 2 launch/pretrain.py --config ...

`--help` lists every flag and the exit codes.
"""

import signal

if __name__ == "__main__":
    # First of all: a signal at any moment from here on ends in the run's own exit code. It waits
    # until the handlers are there, which on a machine with much else to do takes seconds.
    waiting = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    unmasked = signal.pthread_sigmask(signal.SIG_BLOCK, waiting)

import os
import sys
from contextlib import suppress
from pathlib import Path

from megasparse.distributed.signals import StoppedEarly, StopRequest

if __name__ == "__main__":
    stop = StopRequest().install()
    signal.pthread_sigmask(signal.SIG_SETMASK, unmasked)

from megasparse.distributed.launchers import watch_launchers

if __name__ == "__main__":
    watch_launchers()

# Before torch: a lost peer is one line of ours, not a stack of its store's.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from megasparse import log
from megasparse.checkpoint.identity import newest_step
from megasparse.checkpoint.lock import RunLock
from megasparse.config import ResolvedConfig, build_parser
from megasparse.distributed.environment import attempt, rank_for_log, settle_environment
from megasparse.distributed.start_notes import StartNotes
from megasparse.distributed.supervise import is_supervised, supervise
from megasparse.errors import EXIT_PREEMPTED, MegasparseError, one_line
from megasparse.preflight.plan import answer
from megasparse.preflight.settings import Prepared, prepare, require_own_folders


def run(stop: StopRequest) -> int:
    """The exit code of this rank."""
    log.setup(rank_for_log())
    notes: StartNotes | None = None

    def begin_notes(config: ResolvedConfig) -> None:
        nonlocal notes
        notes = StartNotes(Path(config.checkpoint.run_dir), rank, attempt())
        notes.clear()

    try:
        if (told := answer(sys.argv[1:])) is not None:
            if rank_for_log() == 0:
                print(told)
            return 0
        rank, world = settle_environment()
        prepared = prepare(sys.argv[1:], world, begin_notes)
        log.setup(rank, prepared.config.logging.log_level)
        if not is_supervised():
            for note in prepared.notes:
                log.logger.info("%s", note)
            for warning in prepared.warnings if rank == 0 else ():
                log.logger.warning("%s", warning)
        if prepared.config.checkpoint.max_restarts and not is_supervised():
            return restarting(prepared, rank, stop)
    except MegasparseError as error:
        tell(error)
        if notes is not None:
            notes.leave(f"{type(error).__name__}: {one_line(error)}", error.exit_code)
        return error.exit_code
    return train(prepared, stop, notes)


MAX_TOLD = 30  # problems of one start


def restarting(prepared: Prepared, rank: int, stop: StopRequest) -> int:
    """The training as a child of this process, which has the run's folders all the time."""
    settings = prepared.config.checkpoint
    folders = [Path(settings.run_dir), Path(settings.save)]
    lock = RunLock(folders) if rank == 0 else None
    try:
        return supervise(
            settings,
            [sys.executable, *sys.argv],
            rank,
            lambda: newest_step(Path(settings.save)),
            lambda: require_own_folders(prepared.config),
            stop,
        )
    finally:
        if lock is not None:
            lock.release()


def tell(error: MegasparseError) -> None:
    """What is wrong: a line for each problem."""
    name, problems = type(error).__name__, error.problems or (str(error),)
    for number, problem in enumerate(problems[:MAX_TOLD], 1):
        which = f" {number} of {len(problems)}" if len(problems) > 1 else ""
        log.logger.error("%s%s: %s", name, which, " ".join(problem.split()))


def train(prepared: Prepared, stop: StopRequest, notes: StartNotes | None) -> int:
    """The training itself; its imports take seconds, so a mistake is told before."""

    def leave(reason: StoppedEarly) -> None:
        with suppress(Exception):  # the terminal may be gone
            log.logger.warning("%s", reason)
        if notes is not None:
            notes.leave(f"another rank was {reason}", EXIT_PREEMPTED)
        os._exit(EXIT_PREEMPTED)

    with stop.at_once(leave):
        from megasparse.megatron.import_without_compile import import_megatron

        import_megatron()
        from megasparse.train.main import main

    return main(prepared, stop, notes)


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        build_parser().print_help()
        sys.exit(0)
    code = run(stop)
    stop.no_more()
    with suppress(OSError):  # the terminal may be gone
        sys.stderr.flush()
    if code:
        # Other ranks may wait in a collective: leave without their goodbye.
        os._exit(code)
