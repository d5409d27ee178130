"""The queue of runs: how many at a time, on which GPU, with which log, and what a failure does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megasparse.errors import MegasparseError
from tools.experiments import run_queue

# A process that says on which GPU it is, waits until a file of another one is there, and ends.
PROGRAM = """
import os, pathlib, sys, time
own, other, code = sys.argv[1:]
print("gpu", os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
pathlib.Path(own).touch()
while other != "-" and not pathlib.Path(other).exists():
    time.sleep(0.01)
sys.exit(int(code))
"""


def _task(folder: Path, name: str, other: str = "-", code: int = 0, kind: str = "kind"):
    needed = str(folder / other) if other != "-" else "-"
    arguments = (str(folder / name), needed, str(code))
    return run_queue.Task(kind, name, folder / f"{name}-run", arguments)


def _start(arguments, extra, log):
    environment = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"} | extra
    command = [sys.executable, "-c", PROGRAM, *arguments]
    if log is None:
        return subprocess.Popen(command, env=environment)
    with open(log, "ab") as stream:
        return subprocess.Popen(command, env=environment, stdout=stream)


def _queue(lines: list[str], **options):
    return run_queue.RunQueue(_start, say=lines.append, **options)


def test_as_many_at_a_time_as_there_are_jobs(tmp_path):
    """`a` ends only once `c` has begun: the slot of `b` is filled while `a` is under way."""
    lines, ended = [], []
    tasks = [_task(tmp_path, "a", "c"), _task(tmp_path, "b"), _task(tmp_path, "c")]
    queue = _queue(lines, jobs=2, gpus=["6", "7"])
    assert queue.run(tasks, lambda task, seconds: ended.append((task.name, seconds))) == []
    assert {name for name, _ in ended} == set("abc") and all(seconds for _, seconds in ended)
    logs = {task.name: task.log.read_text() for task in tasks}
    assert logs == {"a": "gpu 6\n", "b": "gpu 7\n", "c": "gpu 7\n"}
    assert [line.split()[0] for line in lines if "..." in line] == ["a", "b", "c"]
    assert f"a ... on GPU 6 ({tmp_path / 'a-run.log'})" in lines
    assert len(queue.seconds["kind"]) == 3


def test_more_jobs_than_gpus_share_them(tmp_path):
    lines = []
    queue = _queue(lines, jobs=3, gpus=["6", "7"])
    tasks = [_task(tmp_path, "a", "c"), _task(tmp_path, "b", "c"), _task(tmp_path, "c")]
    assert queue.run(tasks, lambda *_: None) == [] and queue.shares()
    assert [task.log.read_text() for task in tasks] == ["gpu 6\n", "gpu 7\n", "gpu 6\n"]
    assert (
        not _queue(lines, jobs=2, gpus=["6", "7"]).shares() and not _queue(lines, jobs=2).shares()
    )


def test_a_run_waits_for_what_another_makes(tmp_path):
    made = tmp_path / "made"

    def start(arguments, extra, log):
        if arguments[0].endswith("b"):
            made.mkdir()
        return _start(arguments, extra, log)

    lines, ended = [], []
    first, maker, never = (_task(tmp_path, name) for name in "abc")
    first, never = replace(first, needs=made), replace(never, needs=tmp_path / "never")
    queue = run_queue.RunQueue(start, say=lines.append)
    left = queue.run([first, never, maker], lambda task, seconds: ended.append((task, seconds)))
    assert left == [never] and [task for task, _ in ended] == [maker, first]
    assert ended[1][1] is None  # it did not run from its first step
    assert [line.split()[0] for line in lines if "..." in line] == ["b", "a"]


def test_one_at_a_time_keeps_the_terminal(tmp_path, capfd):
    lines = []
    assert _queue(lines).run([_task(tmp_path, "a"), _task(tmp_path, "b")], lambda *_: None) == []
    assert capfd.readouterr().out == "gpu None\ngpu None\n"
    assert not list(tmp_path.glob("*.log"))
    assert [line.partition(" in ")[0] for line in lines] == ["a ...", "a: done", "b ...", "b: done"]


def test_a_failure_lets_those_under_way_end(tmp_path):
    """`b` fails while `a` waits for what the test writes once the failure was told; `c` never
    begins."""
    ended = []

    def say(line):
        if "exit code" in line:
            (tmp_path / "failed").touch()

    queue = run_queue.RunQueue(_start, jobs=2, say=say)
    tasks = [_task(tmp_path, "a", "failed"), _task(tmp_path, "b", code=66), _task(tmp_path, "c")]
    with pytest.raises(MegasparseError, match="b: ended with exit code 66, see") as e:
        queue.run(tasks, lambda task, _: ended.append(task.name))
    assert e.value.exit_code == 66 and str(tmp_path / "b-run.log") in str(e.value)
    assert ended == ["a"] and not (tmp_path / "c").exists()


def test_what_would_not_end_in_time_is_not_begun(tmp_path):
    lines = []
    soon = time.monotonic() + 3600
    known = {"short": [1.0], "long": [72000.0]}
    queue = _queue(lines, deadline=soon, seconds=known)
    names = (("a", "long"), ("b", "short"), ("c", "unknown"))
    tasks = [_task(tmp_path, name, kind=kind) for name, kind in names]
    left = queue.run(tasks, lambda *_: None)
    assert [task.name for task in left] == ["a", "c"]  # c: the mean of all known is too long
    # Nothing is known: the first begins, unless the time is over.
    assert _queue(lines, deadline=soon).run(tasks[2:], lambda *_: None) == []
    assert _queue(lines, deadline=time.monotonic()).run(tasks[2:], lambda *_: None) == tasks[2:]


def test_the_deadline_ends_what_is_under_way_if_asked(tmp_path):
    """`a` waits for ever: it is ended at the deadline, and `b` does not begin."""
    lines, ended = [], []
    tasks = [_task(tmp_path, "a", "never"), _task(tmp_path, "b")]
    queue = _queue(lines, deadline=time.monotonic() + 0.3, stops=True)
    left = queue.run(tasks, lambda task, _: ended.append(task.name))
    assert [task.name for task in left] == ["a", "b"] and not ended
    assert lines[0] == "a ..." and lines[1].startswith("a: stopped by the time limit after ")


def test_the_others_begin_in_spite_of_a_failure_if_asked(tmp_path):
    ended = []
    queue = _queue([], goes_on=True)
    tasks = [_task(tmp_path, "a", code=66), _task(tmp_path, "b"), _task(tmp_path, "c", code=67)]
    with pytest.raises(MegasparseError, match="a: ended with exit code 66") as e:
        queue.run(tasks, lambda task, _: ended.append(task.name))
    assert e.value.exit_code == 66 and ended == ["b"] and (tmp_path / "c").exists()


def test_the_end_of_the_queue_ends_its_runs(tmp_path):
    """SIGTERM to the tool reaches what it started, and the tool waits for it."""
    started = []

    def start(arguments, extra, log):
        started.append(_start(arguments, extra, log))
        return started[-1]

    before = signal.getsignal(signal.SIGTERM)
    queue = run_queue.RunQueue(
        start, jobs=2, say=lambda line: line.startswith("b") and os.kill(os.getpid(), 15)
    )
    tasks = [_task(tmp_path, "a", "never"), _task(tmp_path, "b", "never")]
    with pytest.raises(SystemExit) as e:
        queue.run(tasks, lambda *_: None)
    assert e.value.code == 143 and signal.getsignal(signal.SIGTERM) is before
    assert [process.returncode for process in started] == [-15] * len(started) and started


def test_visible_gpus_keep_their_names(monkeypatch):
    monkeypatch.setattr(run_queue.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 5")
    assert run_queue.visible_gpus() == ["3", "5"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert run_queue.visible_gpus() == ["0", "1"]
    monkeypatch.setattr(run_queue.torch.cuda, "device_count", lambda: 0)
    assert run_queue.visible_gpus() == []
