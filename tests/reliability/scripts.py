"""`launch/pretrain.py` as a user starts it, alone or below a launcher, and what belongs to it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.dist import free_port

ROOT = Path(__file__).parents[2]
MARK = "MEGASPARSE_TEST_LOG"  # a variable by which all processes of a start are known
LONG = ["--train-iters", "1000000"]
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
LAUNCHERS = {
    "deepspeed": "-m deepspeed.launcher.runner --num_accelerators 2 --master_port",
    "torchrun": "-m torch.distributed.run --nproc-per-node 2 --master-port",
    "none": "",
}


def start_script(
    run: list[str], log: Path, launcher: str = "none", before: Sequence[str] = ()
) -> subprocess.Popen:
    """`launch/pretrain.py` in a session of its own.

    Args:
        log: gets standard output and error, after what it holds; stands for the start below.
        launcher: one of `LAUNCHERS`, with two ranks but for "none".
        before: more words before the script.
    """
    environment = {k: v for k, v in os.environ.items() if k not in VARIABLES}
    above_all = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment |= {MARK: str(log), "PYTHONPATH": os.pathsep.join(filter(None, above_all))}
    environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    above = LAUNCHERS[launcher].split()
    above += [str(free_port())] if above else []
    with open(log, "ab") as stream:
        return subprocess.Popen(
            [sys.executable, *above, *before, str(ROOT / "launch" / "pretrain.py"), *run],
            cwd=ROOT,
            env=environment,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
            preexec_fn=_as_at_a_terminal,
        )


def _as_at_a_terminal() -> None:
    """What `nohup`, and `&` in a script, leave ignored would stay so in launchers."""
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


def wait_for(what: Callable[[], Any], seconds: float = 180.0) -> Any:
    """Until something is so; what it was then.

    Raises:
        TimeoutError: it did not come.
    """
    end = time.monotonic() + seconds
    while not (found := what()):
        if time.monotonic() > end:
            raise TimeoutError(f"not so within {seconds:.0f} s")
        time.sleep(0.02)
    return found


def processes_of(log: Path) -> list[int]:
    """All living processes of a start, orphans and other sessions too."""
    found, mark = [], f"{MARK}={log}".encode()
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{name}/environ", "rb") as stream:
            if mark in stream.read().split(b"\0"):
                found.append(int(name))
    return found


def ranks_of(log: Path) -> list[int]:
    """The processes of a start that run `launch/pretrain.py`; not supervisors of others."""
    scripts = {p for p in processes_of(log) if _is_script(p)}
    return sorted(scripts - {_parent(p) for p in scripts})


def inner_launcher(log: Path) -> int | None:
    """DeepSpeed's second process of a start, which starts the ranks."""
    for process in processes_of(log):
        with contextlib.suppress(OSError):
            if b"deepspeed.launcher.launch" in _words(process):
                return process
    return None


def handles(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        caught = next(line for line in lines if line.startswith("SigCgt:"))
        return bool(int(caught.split()[1], 16) >> (number - 1) & 1)
    return False


def _words(pid: int) -> list[bytes]:
    return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")


def _is_script(pid: int) -> bool:
    """Whether it is `python [-u] launch/pretrain.py`, not a launcher of it."""
    with contextlib.suppress(OSError):
        return any(word.endswith(b"launch/pretrain.py") for word in _words(pid)[1:3])
    return False


def _parent(pid: int) -> int:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0
