"""Restarts: from the last checkpoint, in step on all ranks, and an end to those without use."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from megasparse.checkpoint.directory import list_steps
from megasparse.config import CheckpointConfig
from megasparse.distributed import supervise as supervise_module
from megasparse.distributed.supervise import supervise
from tests.runs import TINY

ROOT = Path(__file__).parents[2]

# A training in miniature: MODE says how each attempt of each rank ends.
_CHILD = """
import json, os, pathlib, sys, time
root = pathlib.Path(sys.argv[1])
rank, attempt = sys.argv[2], int(os.environ["MEGASPARSE_ATTEMPT"])
plan = json.loads(sys.argv[3])[rank]
what = plan[min(attempt, len(plan) - 1)]
with open(root / "starts", "a") as stream:
    stream.write(f"{rank}:{attempt}:{'--resume' in sys.argv}\\n")
if what.startswith("save"):
    (root / "checkpoints" / f"step-{attempt + 1:08d}").mkdir(parents=True)
    what = what[5:]
if what.startswith("late"):
    time.sleep(2)
    what = what[5:]
if what == "wait":
    time.sleep(600)
if what == "kill":
    os.kill(os.getpid(), 9)
if what == "stop":
    os.kill(os.getpid(), 19)
sys.exit(int(what))
"""


def _run(
    root: Path,
    plan: dict[str, list[str]],
    ranks_a_host: int = 100,
    counted: bool = False,
    **limits: int,
) -> dict[int, int]:
    """Supervisors of all ranks in processes of their own; their exit codes by rank."""
    root.mkdir(exist_ok=True)
    settings = CheckpointConfig(run_dir=str(root), save=str(root / "checkpoints"), **limits)
    children = {}
    for rank in range(len(plan)):
        child = os.fork()
        if child == 0:
            command = [
                sys.executable,
                "-c",
                textwrap.dedent(_CHILD),
                str(root),
                str(rank),
                json.dumps(plan),
            ]
            newest = functools.partial(_newest, root / "checkpoints")
            os.environ["MEGASPARSE_LAUNCH"] = str(1 + rank // ranks_a_host)
            if counted:
                sys.addaudithook(functools.partial(_note_look, root, rank))
            os._exit(supervise(settings, command, rank, newest))
        children[child] = rank
    codes = {}
    while children:
        child, status = os.wait()
        if child in children:
            codes[children.pop(child)] = os.waitstatus_to_exitcode(status)
    return codes


def _note_look(root: Path, rank: int, event: str, arguments: tuple) -> None:
    """Audit hook: a rank opens the board, a file that hosts share, in the first attempt.

    (In the next one a leader may end before its host's other ranks, and one of these takes over.)
    """
    if event == "open" and str(arguments[0]).endswith(".attempt.json"):
        if ":1:" in (root / "starts").read_text():
            return
        with open(root / f"looks-{rank}", "a") as stream:
            stream.write("x")


def _newest(saved: Path) -> int:
    return max(list_steps(saved), default=-1)


def _starts(root: Path) -> set[str]:
    return set((root / "starts").read_text().split())


def test_a_killed_rank_starts_again_with_the_others(tmp_path):
    root = tmp_path / "run"
    codes = _run(root, {"0": ["71", "0"], "1": ["kill", "0"]}, max_restarts=3)
    assert codes == {0: 0, 1: 0}
    # (Rank 1's first child may be ended before it has written its line.)
    assert {"0:0:True", "0:1:True", "1:1:True"} <= _starts(root)


def test_a_rank_that_waits_for_a_dead_one_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(supervise_module, "MEETING_SECONDS", 0.5)
    codes = _run(tmp_path / "run", {"0": ["wait", "0"], "1": ["kill", "0"]}, max_restarts=1)
    assert codes == {0: 0, 1: 0}


def test_a_stopped_child_is_killed_when_its_attempt_is_over(tmp_path):
    codes = _run(tmp_path / "run", {"0": ["71", "0"], "1": ["stop", "0"]}, max_restarts=1)
    assert codes == {0: 0, 1: 0}


def test_one_rank_of_each_host_looks_at_what_hosts_share(tmp_path, monkeypatch):
    """However long they wait; a failure on any host, and the order to start again, reach all."""
    monkeypatch.setattr(supervise_module, "BOARD_SECONDS", 0.0)
    monkeypatch.setattr(supervise_module, "MEETING_SECONDS", 0.1)
    root = tmp_path / "run"
    root.mkdir()
    (root / "starts").touch()
    plan = {str(rank): ["wait", "0"] for rank in range(6)} | {"4": ["late kill", "0"]}
    codes = _run(root, plan, ranks_a_host=3, counted=True, max_restarts=1)
    assert codes == dict.fromkeys(range(6), 0)
    looks = [len((root / f"looks-{rank}").read_text()) for rank in range(6)]
    for host in (looks[:3], looks[3:]):
        assert sorted(host)[1] <= 2, looks  # at the start
    assert max(looks[3:]) > 10, looks


@pytest.mark.parametrize("code", [0, 64, 65, 66, 75])
def test_some_ends_are_final(tmp_path, code):
    root = tmp_path / "run"
    assert _run(root, {"0": [str(code)], "1": [str(code)]}, max_restarts=9) == {0: code, 1: code}
    assert len(_starts(root)) == 2


def test_restarts_without_progress_end_with_their_own_code(tmp_path):
    root = tmp_path / "run"
    limits = {"max_restarts": 50, "max_restarts_without_progress": 3}
    assert _run(root, {"0": ["71"], "1": ["kill"]}, **limits) == {0: 76, 1: 76}
    assert {line for line in _starts(root) if line[0] == "0"} == {f"0:{n}:True" for n in range(3)}


def test_a_run_that_a_signal_ends_for_good_has_the_code_of_a_shell(tmp_path):
    limits = {"max_restarts": 1, "max_restarts_without_progress": 9}
    assert _run(tmp_path / "run", {"0": ["kill"]}, **limits) == {0: 128 + 9}


def test_progress_resets_the_count_and_the_total_is_limited(tmp_path):
    root = tmp_path / "run"
    limits = {"max_restarts": 4, "max_restarts_without_progress": 2}
    assert _run(root, {"0": ["save 71"]}, **limits) == {0: 71}
    assert len(_starts(root)) == 5


def test_what_an_earlier_job_left_is_not_taken_for_an_order(tmp_path):
    root = tmp_path / "run"
    assert _run(root, {"0": ["71", "0"], "1": ["kill", "0"]}, max_restarts=3) == {0: 0, 1: 0}
    (root / "starts").unlink()
    assert _run(root, {"0": ["71", "0"], "1": ["kill", "0"]}, max_restarts=3) == {0: 0, 1: 0}
    assert {"0:0:True", "0:1:True", "1:1:True"} <= _starts(root)


def test_a_second_start_leaves_a_supervised_run_alone(tmp_path, dataset):
    run_dir = tmp_path / "run"
    flags = [*TINY, "--data-path", dataset, "--run-dir", str(run_dir), "--max-restarts", "5"]
    command = [sys.executable, "launch/pretrain.py", *flags, "--resume"]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}

    def start(*more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*command, *more], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
        )

    first = start("--train-iters", "1000000")
    try:
        end = time.monotonic() + 120
        while not (run_dir / "metrics.jsonl").exists():
            assert time.monotonic() < end and first.poll() is None
            time.sleep(0.1)
        board = (run_dir / ".attempt.json").read_bytes()
        kinds = ((), ("--max-restarts", "0"), ("--save", str(tmp_path / "other")))
        for second in [start(*more) for more in kinds]:
            _, text = second.communicate(timeout=120)
            assert second.returncode == 74
            (line,) = [line for line in text.splitlines() if "Error" in line]
            assert f"another run writes here: process {first.pid} on " in line
            assert "last seen" in line and "is free once it has ended" in line
        assert (run_dir / ".attempt.json").read_bytes() == board
        assert not list(run_dir.glob(".attempt.json.failed-*")) and first.poll() is None
        first.terminate()
        assert first.wait(60) == 75
        assert not list(run_dir.rglob(".lock"))
    finally:
        first.kill()
        first.communicate()
