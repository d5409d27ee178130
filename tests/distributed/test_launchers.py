"""A rank whose launcher is gone is asked to stop."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from functools import partial

import pytest

from megasparse.distributed.launchers import launchers

_RANK = """
import sys, time
from megasparse.distributed import launchers
launchers.INTERVAL_SECONDS = 0.05
launchers.watch_launchers()
print(len(launchers.launchers()), flush=True)
time.sleep(60)
"""
_LAUNCHER = """
import subprocess, sys
script, *inner = sys.argv[1:]
command = [*inner, script] if inner else ["-c", script]
sys.exit(subprocess.Popen([sys.executable, *command]).wait())
"""

# A shell that starts a command which begins when that shell has ended.
_ORPHAN = (
    "bash -c 'while read -r _ _ _ parent _ < /proc/$$/stat; [ $parent = $0 ]; do sleep 0.02; done; "
    'eval "exec $1"\' $$ {} &'
)


@pytest.mark.parametrize("killed", ["outer", "inner"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_rank_ends_when_either_launcher_does(tmp_path, killed, number):
    # As DeepSpeed's: the outer process starts the inner one, which starts the ranks.
    for name in ("deepspeed", "launch.py"):
        (tmp_path / name).write_text(textwrap.dedent(_LAUNCHER))
    outer, inner = (str(tmp_path / name) for name in ("deepspeed", "launch.py"))
    process = subprocess.Popen(
        [sys.executable, outer, _RANK, inner],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"2\n"
    above = _children(process.pid)
    (rank,) = _children(above[0])
    os.kill(process.pid if killed == "outer" else above[0], number)
    end = time.monotonic() + 30
    while _alive(rank) and time.monotonic() < end:
        time.sleep(0.02)
    assert not _alive(rank)
    process.kill()
    process.wait()


@pytest.mark.parametrize("start", ["setsid --wait", "orphan", "namespace"])
def test_a_launcher_without_a_parent_may_have_been_started_so(tmp_path, start):
    """By sshd (a session of its own), by `nohup` in a shell that has ended, in a container."""
    if start == "namespace":
        start = "unshare --pid --fork --mount-proc"
        if subprocess.run([*start.split(), "true"], capture_output=True).returncode:
            pytest.skip("`unshare --pid` is not allowed here, so no container can be imitated")
    inner = tmp_path / "launch.py"
    inner.write_text(textwrap.dedent(_LAUNCHER))
    # The rank trains for many looks at its launcher.
    rank = _RANK.replace("sleep(60)", "sleep(1)") + "print('trained')"
    # Words of DeepSpeed's command.
    name = ["-X", "deepspeed.launcher.launch", "-X", "--node_rank=1"]
    command = shlex.join([sys.executable, *name, str(inner), rank, "-c"])
    command = _ORPHAN.format(shlex.quote(command)) if start == "orphan" else f"{start} {command}"
    done = subprocess.run(["bash", "-c", command], stdout=subprocess.PIPE, timeout=60)
    assert done.stdout == b"1\ntrained\n"


@pytest.mark.parametrize("launcher", ["deepspeed", "deepspeed's inner", "torchrun"])
def test_a_launcher_that_died_before_the_rank_began_is_missed(tmp_path, launcher, monkeypatch):
    """The outer process of one host; the inner one, or torchrun, with what they set for ranks."""
    if launcher == "deepspeed":
        inner = tmp_path / "launch.py"
        inner.write_text(textwrap.dedent(_LAUNCHER))
        words = [sys.executable, "-X", "deepspeed.launcher.launch", str(inner), _RANK, "-c"]
    else:
        names = {"torchrun": ["TORCHELASTIC_RUN_ID", "TORCHELASTIC_MAX_RESTARTS"]}
        for name in names.get(launcher, ["CROSS_RANK", "LOCAL_SIZE"]):
            monkeypatch.setenv(name, "0")
        words = [sys.executable, "-c", _RANK]
    command = _ORPHAN.format(shlex.quote(shlex.join(words)))
    run = partial(subprocess.run, capture_output=True, timeout=60, start_new_session=True)
    begun = run(["bash", "-c", command])
    assert b"was gone before this rank began" in begun.stderr
    assert begun.stdout == b""  # SIGTERM, which a run would have noted
    # The same below a process that is there.
    command = shlex.join(words).replace("sleep(60)", "sleep(0)")
    begun = run(["bash", "-c", command + "; true"])
    assert begun.stdout == (b"1\n" if launcher == "deepspeed" else b"0\n") and not begun.stderr


def test_shells_and_other_parents_are_no_launchers(tmp_path):
    assert launchers() == {}
    command = f"{sys.executable} -c '{_RANK}' ; true # deepspeed torchrun"
    process = subprocess.Popen(["bash", "-c", command], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"0\n"
    for child in _children(process.pid):
        os.kill(child, signal.SIGKILL)
    process.wait()


def _children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as stream:
        return [int(child) for child in stream.read().split()]


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stream:
            return stream.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
