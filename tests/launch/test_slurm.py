"""The sbatch script on a real Slurm of two nodes: stop by the signal, requeue, resume, a kill."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

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


@pytest.fixture(scope="module")
def slurm(tmp_path_factory) -> Iterator[Slurm]:
    require("slurmctld", "slurmd", "munged", "sbatch")
    folder = tmp_path_factory.mktemp("slurm")
    with make_nodes(2, "ms") as nodes, make_slurm(folder, nodes) as cluster:
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


def test_stopped_by_the_signal_queued_again_and_resumed_bit_for_bit(slurm, config, tmp_path):
    run_dir, log, metrics = tmp_path / "run", tmp_path / "job.log", tmp_path / "run/metrics.jsonl"
    job = slurm.submit(
        "--nodes=2", f"--output={log}", SCRIPT, str(config), "--run-dir", str(run_dir)
    )
    wait_for(lambda: metrics.exists() and len(read_metrics(metrics)) > 5, "first steps", log)
    # The warning that Slurm sends ahead of the time limit (--signal=B:USR1@300).
    slurm.run("scancel", "--signal=USR1", "--batch", job)
    wait_for(lambda: slurm.facts(job).get("Restarts") == "1", "requeue", log)
    facts = slurm.wait(job, {"COMPLETED", "FAILED", "CANCELLED"}, log)
    text = log.read_text()
    assert (facts["JobState"], facts["ExitCode"]) == ("COMPLETED", "0:0"), text
    assert text.count("told to stop") == 1 and "exit code 75: queued again" in text, text
    assert f"job {job}, start 1, run {run_dir}" in text, text

    starts = [
        sorted(path.name for path in (run_dir / "logs" / f"{job}-{n}").glob("*.log"))
        for n in (0, 1)
    ]
    assert starts == [["rank-0.log", "rank-1.log"]] * 2
    first, second = ((run_dir / "logs" / f"{job}-{n}") for n in (0, 1))
    words = (first / "rank-0.log").read_text()
    assert "stopped at step" in words and "SIGUSR1" in words, words
    assert "2 ranks meet at 10.77.0.1; the store listens on ('10.77.0.1'" in words, words
    assert "continuing" in (second / "rank-0.log").read_text()

    reference = tmp_path / "reference"
    flags = ["--config", str(config), "--run-dir", str(reference)]
    assert forked.run(flags, 2, tmp_path / "reference.log") == [0, 0]
    assert differences(run_dir, reference) == []

    shown = slurm.run("launch/slurm/watch.sh", str(run_dir), "1", FOLLOW="no")
    assert shown.startswith(f"{run_dir}: step {STEPS}, loss "), shown


def test_a_killed_worker_ends_the_job_with_the_reason(slurm, config, tmp_path):
    log = tmp_path / "job.log"
    job = slurm.submit(
        "--nodes=2",
        f"--output={log}",
        SCRIPT,
        str(config),
        "--run-dir",
        str(tmp_path / "run"),
        MEGASPARSE_FAULT="kill@1:5:step_end",
    )
    # The list shows the job with its run.
    shown = rf"{job} +megasparse +RUNNING .*{tmp_path}/run"
    wait_for(lambda: bool(re.search(shown, slurm.run("launch/slurm/watch.sh"))), "list", log)
    facts = slurm.wait(job, {"COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL"}, log)
    text = log.read_text()
    assert facts["JobState"] == "FAILED" and facts["Restarts"] == "0", text
    assert "PeerError: rank 1 was lost" in text, text


def test_a_cancelled_job_on_one_node_saves_and_stays_cancelled(slurm, config, tmp_path):
    run_dir, log, metrics = tmp_path / "run", tmp_path / "job.log", tmp_path / "run/metrics.jsonl"
    flags = ["--run-dir", str(run_dir), "--train-iters", "100000"]
    job = slurm.submit(f"--output={log}", SCRIPT, str(config), *flags, RANKS_PER_NODE="2")
    wait_for(lambda: metrics.exists() and len(read_metrics(metrics)) > 5, "first steps", log)
    slurm.run("scancel", job)
    wait_for(lambda: not slurm.run("squeue", "--noheader", "--jobs", job), "end", log)
    facts = slurm.facts(job)
    assert (facts["JobState"], facts["Restarts"]) == ("CANCELLED", "0"), log.read_text()
    words = (run_dir / "logs" / f"{job}-0" / "rank-0.log").read_text()
    # Slurm's SIGTERM reaches the ranks, or the batch script's word comes first.
    assert re.search(r"stopped at step \d+ \(SIG(TERM|USR1)\)", words), words
    assert "2 ranks meet at 127.0.0.1; the store listens on ('127.0.0.1'" in words, words
    assert len(list((run_dir / "checkpoints").glob("step-*"))) == 1


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
