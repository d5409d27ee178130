"""Ranks that die, stop, hang or fail: named, and the others end; signals and limits: one save."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import pytest

from megasparse.checkpoint.directory import list_steps
from megasparse.metrics.schema import read_metrics
from tests import forked
from tests.reliability.runs import differences, flags

VARIABLE = "MEGASPARSE_FAULT"


EVALUATED = ["--eval-iters", "3", "--eval-interval", "5", "--save-interval", "4"]
KILLS = ["kill@0:6:backward", "kill@1:6:backward", "kill@0:6:save:file", "kill@1:6:save:file"]
EXCEPTIONS = ["exception@1:4:data", "exception@1:4:evaluate", "exception@1:*:build"]
HANG, DISK_FULL, NONE = "hang@1:6:forward", "enospc@1:6:save:sync", ""
# With the step of the save.
SIGNALS = {
    "term@1:*:build": 0, "term@1:0:forward": 1, "term@1:7:optimizer": 8, "term@1:5:evaluate": 5,
    "term@1:20:evaluate": 20, "term@1:4:save:file": 4, "term@0:*:save:rename": 4,
}  # fmt: skip
FAULTS = {
    **dict.fromkeys([*KILLS, DISK_FULL], ["--save-interval", "3"]),
    **dict.fromkeys(EXCEPTIONS, ["--eval-iters", "1", "--eval-interval", "4"]),
    NONE: EVALUATED,
    HANG: ["--hang-timeout", "2"],
    **{fault: [*EVALUATED, *["--async-save"] * ("rename" in fault)] for fault in SIGNALS},
}


class Ended(NamedTuple):
    """How a run of two ranks with a fault ended: its exit codes, logs and checkpoints, and the
    exit codes of its continuation after a signal."""

    run_dir: Path
    codes: list[int | None]
    texts: list[str]
    steps: list[int]
    resumed: list[int | None]


def _texts(log: Path, world: int = 2) -> list[str]:
    return [Path(f"{log}.{rank}").read_text() for rank in range(world)]


def _strike(dataset: str, folder: Path, fault: str) -> Ended:
    log, run = folder / "log", flags(dataset, folder / "run", *FAULTS[fault])
    codes = forked.run(run, 2, log, {VARIABLE: fault} if fault else None)
    texts, steps = _texts(log), list_steps(folder / "run" / "checkpoints")
    resumed = forked.run([*run, "--resume"], 2, log) if fault in SIGNALS else []
    return Ended(folder / "run", codes, texts, steps, resumed)


@pytest.fixture(scope="module")
def ended(tmp_path_factory, dataset) -> Iterator[Callable[[str], Ended]]:
    """Runs by their fault. Each waits for much of its time, so three go side by side."""
    with ThreadPoolExecutor(3) as pool:
        runs = {
            fault: pool.submit(_strike, dataset, tmp_path_factory.mktemp("fault"), fault)
            for fault in FAULTS
        }
        yield lambda fault: runs[fault].result()


@pytest.mark.parametrize("fault", KILLS)
def test_a_killed_rank_is_named_and_the_other_ends(ended, fault):
    rank, run = int(fault[5]), ended(fault)
    assert run.codes[rank] == -signal.SIGKILL and run.codes[1 - rank] == 71
    assert f"PeerError: rank {rank} was lost" in run.texts[1 - rank]
    # A save that one rank could not finish is not published.
    assert run.steps[0] == (6 if "backward" in fault else 3)


def test_a_stopped_rank_is_named(tmp_path, dataset):
    # These steps take 0.03 s; a rank tells where it is every 0.25 s.
    run = flags(dataset, tmp_path / "run", "--hang-timeout", "3", "--train-iters", "60")
    ranks = forked.start(run, 2, tmp_path / "log", {VARIABLE: "stop@1:50:forward"})
    assert forked.wait(ranks[:1]) == [71]
    ranks[1].kill()  # a stopped process cannot end by itself
    forked.wait(ranks)
    assert "PeerError: rank 1 was lost in step" in _texts(tmp_path / "log")[0]


def test_a_hanging_rank_is_named_with_what_the_others_wait_for(ended):
    run = ended(HANG)
    assert run.codes == [71, 71]
    for text in run.texts:
        assert "PeerError: rank 1 hangs in step 7, micro-batch 0" in text
        assert "_strike" in text and "others wait in all_reduce" in text
    assert "_strike" in (run.run_dir / "stacks-rank-00001.txt").read_text()


@pytest.mark.parametrize("fault", EXCEPTIONS)
def test_an_exception_on_one_rank_reaches_all(ended, fault):
    run = ended(fault)
    assert run.codes == [1, 1]
    words = f"RuntimeError: exception injected by {VARIABLE} at {fault.rpartition(':')[2]}"
    assert f"rank 1 failed: {words}" in run.texts[0] and words in run.texts[1]


def test_a_save_that_fails_on_one_rank_fails_on_all(ended):
    run = ended(DISK_FULL)
    assert run.codes == [74, 74]
    for text in run.texts:
        assert "StorageError: rank 0: step-00000006" in text and "No space left" in text
        assert "rank 1: " in text and "Traceback" not in text
    left = [entry.name for entry in (run.run_dir / "checkpoints").glob("step*")]
    assert left == ["step-00000003"]


def _forks() -> None:
    """Ranks of the tests would start a server of their own for their workers."""
    multiprocessing.set_start_method("fork", force=True)


def _start_alone(run: list[str], log: Path, before: Callable[[], object]) -> BaseProcess:
    """A run of one rank, with something done after its imports."""
    variables = {"DS_ACCELERATOR": "cpu"}
    rank = forked.context().Process(target=forked.serve, args=(run, variables, str(log), before))
    rank.start()
    return rank


def test_a_killed_data_worker_is_one_line(tmp_path, dataset):
    run = flags(dataset, tmp_path / "run", "--num-workers", "1", "--train-iters", "100000")
    rank = _start_alone(run, tmp_path / "log.0", _forks)
    end = time.monotonic() + 60
    while not read_metrics(tmp_path / "run" / "metrics.jsonl"):
        assert time.monotonic() < end
        time.sleep(0.02)
    for child in Path(f"/proc/{rank.pid}/task/{rank.pid}/children").read_text().split():
        os.kill(int(child), signal.SIGKILL)
    assert forked.wait([rank]) == [71]
    (text,) = _texts(tmp_path / "log", 1)
    assert "Traceback" not in text and text.count("Error: ") == 1
    assert "PeerError: a data worker (--num-workers) was lost: DataLoader worker" in text


def _no_room(limit: int = 1 << 15) -> None:
    """No file may grow beyond this, as on a disk that is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def test_a_disk_that_is_full_under_the_metrics_is_one_line(tmp_path, dataset):
    # Before there is a checkpoint to write, which is larger.
    run = flags(dataset, tmp_path / "run", "--train-iters", "100000")
    assert forked.wait([_start_alone(run, tmp_path / "log.0", _no_room)]) == [74]
    (text,) = _texts(tmp_path / "log", 1)
    assert "Traceback" not in text and text.count("Error: ") == 1
    assert "error: " in text and "StorageError: " in text and "File too large" in text
    assert not list((tmp_path / "run").rglob(".lock"))


def test_ranks_with_different_settings_are_refused(tmp_path, dataset):
    run = flags(dataset, tmp_path / "run")
    ranks = forked.start(run, 2, tmp_path / "log", more={1: ["--lr", "2e-3"]})
    assert forked.wait(ranks) == [64, 64]
    for text in _texts(tmp_path / "log"):
        assert "ConfigError: lr is 0.001 on rank 0 and 0.002 on rank 1" in text


def test_two_runs_cannot_write_one_folder(tmp_path, dataset):
    run = flags(dataset, tmp_path / "run", "--train-iters", "100000", "--resume")
    first = forked.start(run, 1, tmp_path / "first")
    end = time.monotonic() + 60
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    assert forked.run(run, 1, tmp_path / "second") == [74]
    (text,) = _texts(tmp_path / "second", 1)
    assert f"another run writes here: process {first[0].pid} on " in text
    first[0].kill()
    forked.wait(first)
    assert forked.run([*run, "--exit-interval", "2"], 1, tmp_path / "third") == [75]
    # The same folder once more: a run that is past its end is no failure, and is not run again.
    past = [*run, "--train-iters", "1", "--override-schedule"]
    unused = {"MASTER_PORT": "abc", "CROSS_SIZE": "x"}  # by one rank alone
    assert forked.run(past, 1, tmp_path / "fourth", unused) == [0]
    (text,) = _texts(tmp_path / "fourth", 1)
    assert "nothing to do: at step 2 the run is past its end (--train-iters 1)" in text
    assert list_steps(tmp_path / "run" / "checkpoints") == [2]


@pytest.mark.parametrize("fault", SIGNALS)
def test_a_signal_at_any_moment_gives_one_save_and_an_exact_resume(ended, fault):
    run, undisturbed = ended(fault), ended(NONE)
    assert undisturbed.codes == [0, 0] and run.codes == [75, 75], run.texts
    if "rename" not in fault:  # in the background it comes some steps later
        assert run.steps[0] == SIGNALS[fault]
    assert len(run.steps) == len(set(run.steps))
    assert f"stopped at step {run.steps[0]} (" in run.texts[0]
    assert run.resumed == [0, 0]
    found = differences(run.run_dir, undisturbed.run_dir)
    assert [difference for difference in found if "async" not in difference] == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1, signal.SIGTERM])
def test_every_signal_counts_also_twice(tmp_path, dataset, number):
    run = flags(dataset, tmp_path / "run", "--train-iters", "100000")
    ranks = forked.start(run, 2, tmp_path / "log")
    end = time.monotonic() + 60
    while len(read_metrics(tmp_path / "run" / "metrics.jsonl")) < 3:
        assert time.monotonic() < end
        time.sleep(0.02)
    for _ in range(2):
        os.kill(ranks[1].pid, number)
    assert forked.wait(ranks) == [75, 75]
    (step,) = list_steps(tmp_path / "run" / "checkpoints")
    assert f"stopped at step {step} ({signal.Signals(number).name})" in _texts(tmp_path / "log")[0]


def test_the_time_limit_is_decided_together(tmp_path, dataset):
    run = flags(
        dataset, tmp_path / "run", "--train-iters", "100000", "--exit-duration-in-mins", "0.02"
    )
    assert forked.run(run, 2, tmp_path / "log") == [75, 75]
    assert "(--exit-duration-in-mins is over)" in _texts(tmp_path / "log")[0]
    assert len(list_steps(tmp_path / "run" / "checkpoints")) == 1


def test_a_hang_of_one_rank_alone_is_found_in_every_phase(tmp_path, dataset):
    """Each waits for most of its time, so they run side by side."""
    more = ["--eval-iters", "1", "--eval-interval", "2", "--save-interval", "2"]
    runs = {}
    for point in ("build", "index", "load", "model", "save:file", "evaluate"):
        step = "2" if point in ("save:file", "evaluate") else "*"
        folder = tmp_path / point.replace(":", "-")
        run = flags(dataset, folder / "run", "--hang-timeout", "0.3", *more)
        variables = {VARIABLE: f"hang@0:{step}:{point}"}
        folder.mkdir()
        runs[point] = folder, forked.start(run, 1, folder / "log", variables)
    words = {"save:file": "save:file", "evaluate": "evaluation, micro-batch 0", "load": "load of a"}
    words["model"] = "build of the model"
    for point, (folder, ranks) in runs.items():
        assert forked.wait(ranks) == [71], point
        (text,) = _texts(folder / "log", 1)
        assert f"PeerError: rank 0 hangs in {words.get(point, point)}" in text and "_strike" in text
        assert not list((folder / "run").rglob(".lock"))


def _until_rows(path, number, ranks):
    """Wait until a run has logged so many steps."""
    end = time.monotonic() + 60
    while len(read_metrics(path)) < number:
        assert time.monotonic() < end and all(rank.is_alive() for rank in ranks)
        time.sleep(0.05)


def test_runs_that_are_suspended_go_on(tmp_path, dataset):
    """All ranks of a run, one or two, stopped for longer than a silent or hanging one may take."""
    runs = []
    for world in (1, 2):
        folder = tmp_path / str(world)
        folder.mkdir()
        run = flags(dataset, folder / "run", "--hang-timeout", "3", "--train-iters", "100000")
        ranks = forked.start(run, world, folder / "log")
        runs.append((folder / "run" / "metrics.jsonl", ranks))
    for rows, ranks in runs:
        _until_rows(rows, 3, ranks)
    everyone = [rank for _, ranks in runs for rank in ranks]
    for rank in everyone:
        os.kill(rank.pid, signal.SIGSTOP)
    time.sleep(8)
    before = [len(read_metrics(rows)) for rows, _ in runs]
    for rank in everyone:
        os.kill(rank.pid, signal.SIGCONT)
        time.sleep(0.5)
    for (rows, ranks), number in zip(runs, before, strict=True):
        _until_rows(rows, number + 3, ranks)
        os.kill(ranks[0].pid, signal.SIGHUP)  # a closed terminal
        assert forked.wait(ranks) == [75] * len(ranks)
