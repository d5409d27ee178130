"""Noticing that the launcher is gone: its ranks save and end, in place of training on as orphans.

DeepSpeed's launcher is two processes. The outer one dies of SIGTERM without a word to the inner
one, which starts the ranks; both die of SIGHUP, and both and torchrun's agent of SIGKILL. A thread
looks once a second whether all processes between this one and the user's shell are still there.

One that died before this process looked has left a trace: a process that only a launcher starts,
below one that adopts orphans.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megasparse.log import logger

INTERVAL_SECONDS = 1.0
_COMMANDS = {b"deepspeed", b"ds", b"torchrun", b"launch.py"}
_MODULES = {
    b"deepspeed.launcher.runner", b"deepspeed.launcher.launch",
    b"torch.distributed.run", b"torch.distributed.launch",
}  # fmt: skip
# What torchrun, and DeepSpeed's launcher, set for their ranks, and no other program does.
_OF_RANKS = ({"TORCHELASTIC_RUN_ID", "TORCHELASTIC_MAX_RESTARTS"}, {"CROSS_RANK", "LOCAL_SIZE"})


@dataclass(frozen=True)
class _Process:
    """A process that has not ended, as the system tells of it."""

    parent: int
    session: int
    started: str
    words: tuple[bytes, ...]


def launchers() -> dict[int, str]:
    """The launchers above this process, nearest first: process id and start time of each."""
    return {pid: process.started for pid, process in _chain().items()}


def lost_launcher() -> str | None:
    """The launcher that died before this process looked, in words; None: none is missed.

    DeepSpeed's outer process alone starts an inner one without `--node_rank`; over ssh it has that
    flag. Who starts such an inner process by hand, where the system adopts it, adds the flag.
    """
    chain = _chain()
    if not chain:
        process, name = _look("self"), "the launcher"
        expected = any(names <= os.environ.keys() for names in _OF_RANKS)
    else:
        process, name = list(chain.values())[-1], "DeepSpeed's outer launcher"
        expected = b"deepspeed.launcher.launch" in process.words and not any(
            word.startswith(b"--node_rank") for word in process.words
        )
    return name if expected and process is not None and _is_adopted(process) else None


def watch_launchers(gone: Callable[[], object] | None = None) -> None:
    """Start to look after the launchers above this process, if there are any.

    A launcher whose parent is process 1, or of another session, need not have lost anything: ssh,
    `nohup`, `setsid` and containers start it so. `lost_launcher` has the exceptions.

    Args:
        gone: called once when one of them is no more, in a thread or before this returns; default:
            SIGTERM to this process, as the launcher would have sent it.
    """
    gone = gone or _terminate_this
    if (lost := lost_launcher()) is not None:
        logger.warning("%s was gone before this rank began: it ends", lost)
        gone()
        return
    above = launchers()
    if above:
        arguments = (above, gone)
        threading.Thread(target=_watch, args=arguments, name="launchers", daemon=True).start()


def _watch(above: dict[int, str], gone: Callable[[], object]) -> None:
    pause = threading.Event()
    while not pause.wait(INTERVAL_SECONDS):
        for pid, started in above.items():
            now = _look(pid)
            if now is None or now.started != started:
                logger.warning("the launcher (process %d) is gone: this rank saves and ends", pid)
                gone()
                return


def _chain() -> dict[int, _Process]:
    """The launchers above this process, nearest first."""
    found: dict[int, _Process] = {}
    process = _look("self")
    while process is not None:
        pid, process = process.parent, _look(process.parent)
        if process is None or not any(map(_starts_ranks, process.words[:6])):
            break
        found[pid] = process
    return found


def _starts_ranks(word: bytes) -> bool:
    """Whether a word of a command line names a launcher."""
    return word in _MODULES or word.rpartition(b"/")[2] in _COMMANDS


def _is_adopted(process: _Process) -> bool:
    """Whether the parent is one that the system gives to orphans, not the one that started it.

    That is process 1, or a service of another session. Launchers, whatever their name, are Python.
    """
    if process.parent == 0:  # started from outside of this container
        return False
    parent = _look(process.parent)
    if parent is None:
        return True
    if any(b"python" in word for word in parent.words[:2]):
        return False
    return process.parent == 1 or parent.session != process.session


def _terminate_this() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def _look(pid: int | str) -> _Process | None:
    """A process that has not ended; None: it has."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        words = tuple(Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"))
    except OSError:
        return None
    state, parent, _, session, *rest = text.rpartition(")")[2].split()
    return None if state in "ZX" else _Process(int(parent), int(session), rest[15], words)
