"""Noticing that the launcher is gone: its ranks save and end, in place of training on as orphans.

DeepSpeed's launcher is two processes. The outer one dies of SIGTERM without a word to the inner
one, which starts the ranks; both die of SIGHUP, and both and torchrun's agent of SIGKILL. A thread
looks once a second whether all processes between this one and the user's shell are still there.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

from megasparse.log import logger

INTERVAL_SECONDS = 1.0
_COMMANDS = {b"deepspeed", b"ds", b"torchrun", b"launch.py"}
_MODULES = {
    b"deepspeed.launcher.runner", b"deepspeed.launcher.launch",
    b"torch.distributed.run", b"torch.distributed.launch",
}  # fmt: skip


def launchers() -> dict[int, str]:
    """The launchers above this process, nearest first: process id and start time of each."""
    found: dict[int, str] = {}
    above = _status("self")
    while above is not None:
        parent = above[0]
        above = _status(parent)
        try:
            words = Path(f"/proc/{parent}/cmdline").read_bytes().split(b"\0")[:6]
        except OSError:
            break
        if above is None or not any(_starts_ranks(word) for word in words):
            break
        found[parent] = above[1]
    return found


def watch_launchers(gone: Callable[[], object] | None = None) -> None:
    """Start to look after the launchers above this process, if there are any.

    Only a launcher that was there at this call counts. One whose parent is process 1, or of another
    session, need not have lost a launcher: ssh, `nohup`, `setsid` and containers start it so.

    Args:
        gone: called once, in a thread, when one of them is no more; default: SIGTERM to this
            process, as the launcher would have sent it.
    """
    above = launchers()
    if above:
        arguments = (above, gone or _terminate_this)
        threading.Thread(target=_watch, args=arguments, name="launchers", daemon=True).start()


def _watch(above: dict[int, str], gone: Callable[[], object]) -> None:
    pause = threading.Event()
    while not pause.wait(INTERVAL_SECONDS):
        for pid, started in above.items():
            now = _status(pid)
            if now is None or now[1] != started:
                logger.warning("the launcher (process %d) is gone: this rank saves and ends", pid)
                gone()
                return


def _starts_ranks(word: bytes) -> bool:
    """Whether a word of a command line names a launcher."""
    return word in _MODULES or word.rpartition(b"/")[2] in _COMMANDS


def _terminate_this() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def _status(pid: int | str) -> tuple[int, str] | None:
    """Parent and start time of a process that has not ended; None: it has."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    state, parent, *rest = text.rpartition(")")[2].split()
    return None if state in "ZX" else (int(parent), rest[17])
