"""The sbatch script on a real Slurm of two nodes: stop by the signal, requeue, resume, a kill."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from megasparse.config import dump_yaml, load_config
from megasparse.metrics.schema import read_metrics
from tests import forked
from tests.launch.nodes import ROOT, Slurm, make_nodes, make_slurm, require, wait_for
from tests.reliability.runs import differences
from tests.runs import TINY, make_dataset

SCRIPT = "launch/slurm/pretrain.sbatch"
STEPS = 120  # some seconds: long enough for a signal to come in the midst of it
DROPOUT = ["--hidden-dropout", "0.1", "--attention-dropout", "0.1"]


class Job(NamedTuple):
    """One job that has ended, and where it wrote."""

    number: str
    facts: dict[str, str]
    folder: Path

    @property
    def text(self) -> str:
        return (self.folder / "job.log").read_text()

    def rank_log(self, rank: int = 0, start: int = 0) -> str:
        return (self.folder / f"run/logs/{self.number}-{start}/rank-{rank}.log").read_text()


@pytest.fixture(scope="module")
def slurm(tmp_path_factory) -> Iterator[Slurm]:
    require("slurmctld", "slurmd", "munged", "sbatch")
    folder = tmp_path_factory.mktemp("slurm")
    # Enough for all jobs of this module at once.
    with make_nodes(6, "ms") as nodes, make_slurm(folder, nodes) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """A tiny run's YAML: data parallel 2, everything random in it."""
    folder = tmp_path_factory.mktemp("run")
    flags = [
        *TINY,
        *DROPOUT,
        "--train-iters",
        str(STEPS),
        "--data-path",
        make_dataset(folder / "data"),
        "--log-interval",
        "100",
    ]
    path = folder / "tiny.yaml"
    path.write_text(dump_yaml(load_config(flags)))
    return path


def _submit(slurm: Slurm, config: Path, folder: Path, *flags: str, **variables: str) -> str:
    """The training script for `folder`; sbatch's options come first in `flags`, up to "--"."""
    options, more = flags[: flags.index("--")], flags[flags.index("--") + 1 :]
    log, run = f"--output={folder}/job.log", ["--run-dir", str(folder / "run")]
    return slurm.submit(*options, log, SCRIPT, str(config), *run, *more, **variables)


def _wait_for_steps(folder: Path) -> None:
    metrics, log = folder / "run" / "metrics.jsonl", folder / "job.log"
    wait_for(lambda: metrics.exists() and len(read_metrics(metrics)) > 5, "first steps", log)


def _stopped_by_the_signal(slurm: Slurm, config: Path, folder: Path) -> Job:
    log, job = folder / "job.log", _submit(slurm, config, folder, "--nodes=2", "--")
    _wait_for_steps(folder)
    # The warning that Slurm sends ahead of the time limit (--signal=B:USR1@300).
    slurm.run("scancel", "--signal=USR1", "--batch", job)
    slurm.wait_until(lambda: slurm.facts(job).get("Restarts") == "1", "requeue", log)
    return Job(job, slurm.wait(job, {"COMPLETED", "FAILED", "CANCELLED"}, log), folder)


def _with_a_killed_worker(slurm: Slurm, config: Path, folder: Path) -> Job:
    log, fault = folder / "job.log", "kill@1:5:step_end"
    job = _submit(slurm, config, folder, "--nodes=2", "--", MEGASPARSE_FAULT=fault)
    # The list shows the job with its run.
    shown = rf"{job} +megasparse +RUNNING .*{folder}/run"
    slurm.wait_until(
        lambda: bool(re.search(shown, slurm.run("launch/slurm/watch.sh"))), "list", log
    )
    return Job(job, slurm.wait(job, {"COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL"}, log), folder)


def _cancelled_on_one_node(slurm: Slurm, config: Path, folder: Path) -> Job:
    flags = ["--", "--train-iters", "100000"]
    job = _submit(slurm, config, folder, *flags, RANKS_PER_NODE="2")
    _wait_for_steps(folder)
    slurm.run("scancel", job)
    slurm.wait_until(
        lambda: not slurm.run("squeue", "--noheader", "--jobs", job), "end", folder / "job.log"
    )
    return Job(job, slurm.facts(job), folder)


@pytest.fixture(scope="module")
def jobs(slurm, config, tmp_path_factory) -> Iterator[dict[Callable, Future[Job]]]:
    """Each job waits for most of its time, so they run side by side."""
    kinds = (_stopped_by_the_signal, _with_a_killed_worker, _cancelled_on_one_node)
    with ThreadPoolExecutor() as pool:
        yield {
            kind: pool.submit(kind, slurm, config, tmp_path_factory.mktemp(kind.__name__))
            for kind in kinds
        }


def test_stopped_by_the_signal_queued_again_and_resumed_bit_for_bit(jobs, slurm, config, tmp_path):
    reference = tmp_path / "reference"
    flags = ["--config", str(config), "--run-dir", str(reference)]
    assert forked.run(flags, 2, tmp_path / "reference.log") == [0, 0]

    job = jobs[_stopped_by_the_signal].result()
    text, run_dir = job.text, job.folder / "run"
    assert (job.facts["JobState"], job.facts["ExitCode"]) == ("COMPLETED", "0:0"), text
    assert text.count("told to stop") == 1 and "exit code 75: queued again" in text, text
    assert f"job {job.number}, start 1, run {run_dir}" in text, text
    starts = [
        sorted(path.name for path in (run_dir / "logs" / f"{job.number}-{n}").glob("*.log"))
        for n in (0, 1)
    ]
    assert starts == [["rank-0.log", "rank-1.log"]] * 2
    words, node = job.rank_log(), re.search(r", nodes n\[(\d)", text)
    assert node, text
    first = f"10.77.0.{node[1]}"
    assert "stopped at step" in words and "SIGUSR1" in words, words
    assert f"2 ranks meet at {first}; the store listens on ('{first}'" in words, words
    assert "continuing" in job.rank_log(start=1)
    assert differences(run_dir, reference) == []

    shown = slurm.run("launch/slurm/watch.sh", str(run_dir), "1", FOLLOW="no")
    assert shown.startswith(f"{run_dir}: step {STEPS}, loss "), shown


def test_a_killed_worker_ends_the_job_with_the_reason(jobs):
    job = jobs[_with_a_killed_worker].result()
    assert job.facts["JobState"] == "FAILED" and job.facts["Restarts"] == "0", job.text
    assert "PeerError: rank 1 was lost" in job.text, job.text


def test_a_cancelled_job_on_one_node_saves_and_stays_cancelled(jobs):
    job = jobs[_cancelled_on_one_node].result()
    assert (job.facts["JobState"], job.facts["Restarts"]) == ("CANCELLED", "0"), job.text
    words = job.rank_log()
    # Slurm's SIGTERM reaches the ranks, or the batch script's word comes first.
    assert re.search(r"stopped at step \d+ \(SIG(TERM|USR1)\)", words), words
    assert "2 ranks meet at 127.0.0.1; the store listens on ('127.0.0.1'" in words, words
    assert len(list((job.folder / "run" / "checkpoints").glob("step-*"))) == 1


def test_array_dependency_and_hostfile(slurm, config, tmp_path):
    """What the scripts start, with `echo` in the interpreter's place."""
    sweep = tmp_path / "sweep.txt"
    sweep.write_text("--lr 1e-4\n--lr 3e-4 --seed 5\n")
    run_id = f"array-{tmp_path.parent.name}-{tmp_path.name}"
    job = slurm.submit(
        "--array=1-2",
        f"--output={tmp_path}/%a.log",
        "launch/slurm/array.sbatch",
        str(config),
        str(sweep),
        "--num-workers",
        "1",
        RUN_ID=run_id,
        PYTHON="echo",
    )
    log = tmp_path / "convert.log"
    after = slurm.submit(
        f"--dependency=afterok:{job}",
        "--cpus-per-task=1",
        f"--output={log}",
        "launch/slurm/convert.sbatch",
        "--flag",
        "x",
        PYTHON="echo",
    )
    runs = [ROOT / "runs" / f"{run_id}-{task}" for task in (1, 2)]
    try:
        assert slurm.wait(after, {"COMPLETED", "FAILED"}, log)["JobState"] == "COMPLETED"
        assert "tools/convert_checkpoint.py --flag x" in log.read_text()
        for run, flags in zip(runs, sweep.read_text().splitlines(), strict=True):
            (said,) = run.glob("logs/*-0/rank-0.log")
            run_dir = run.relative_to(ROOT)
            every = f"--config {config} --num-workers 1 {flags}"
            expected = f"launch/pretrain.py {every} --resume --run-dir {run_dir}"
            assert said.read_text().strip() == expected
    finally:
        for run in runs:
            shutil.rmtree(run, ignore_errors=True)
    hosts = slurm.run("launch/slurm/hostfile.sh", "8", SLURM_JOB_NODELIST="n[1-2]")
    assert hosts == "n1 slots=8\nn2 slots=8"
