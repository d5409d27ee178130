"""A profile: a trace in which phases, layers and the three GEMMs are found by name."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megasparse.config import load_config, resolve
from megasparse.errors import ConfigError
from megasparse.train.stragglers import Slowest, StragglerWatch, slowest
from tests import dist
from tests.runs import LLAMA, TINY, train

ROOT = Path(__file__).parents[2]


def _events(path: Path) -> list[dict]:
    with gzip.open(path, "rt") as stream:
        return [e for e in json.load(stream)["traceEvents"] if e.get("ph") == "X"]


def _inside(inner: dict, outer: dict) -> bool:
    begin, end = outer["ts"], outer["ts"] + outer["dur"]
    same = inner["tid"] == outer["tid"]
    return same and begin <= inner["ts"] and inner["ts"] + inner["dur"] <= end + 1e-3


def test_the_trace_has_names(tmp_path, dataset):
    flags = [*TINY, *LLAMA, "--data-path", dataset, "--run-dir", str(tmp_path)]
    flags += ["--tensor-model-parallel-size", "2", "--train-iters", "5", "--log-interval", "2"]
    flags += ["--profile", "--profile-step-start", "2", "--profile-step-end", "4"]
    rows = dist.run(train, 2, [*flags, "--profile-ranks", "1"])[0]
    assert len(rows) == 5 and rows[3]["time_slowest_ratio"] >= 1
    (path,) = (tmp_path / "profile").iterdir()
    assert path.name == "steps-3-4.rank1.json.gz"
    events = _events(path)
    names = {event["name"] for event in events}
    layer = "decoder.layers.1"
    gemms = [
        f"{layer}.mlp.linear_fc2 {what}"
        for what in ("output", "preparation of grad_output", "grad_input", "grad_weight")
    ]
    phases = {"data", "forward", "backward", "optimizer", "preparation", "communication"}
    assert {"step 3", "step 4", layer, f"{layer}.mlp", *gemms, *phases} <= names
    assert not {"step 2", "step 5"} & names
    # 2 layers, a micro-batch in each of two steps of 4 sequences over one data-parallel rank.
    forward = [event for event in events if event["name"] == "forward"]
    outputs = [event for event in events if event["name"] == gemms[0]]
    assert len(outputs) == 2 * 2
    assert all(any(_inside(one, phase) for phase in forward) for one in outputs)
    products = [event for event in events if event["name"] in ("aten::mm", "aten::addmm")]
    assert all(any(_inside(product, one) for product in products) for one in outputs)


def test_a_profile_has_an_extent():
    with pytest.raises(ConfigError, match="profile_step_end 3, expected more than"):
        flags = ["--mock-data", "--vocab-size", "64", "--profile", "--profile-step-start", "3"]
        resolve(load_config([*flags, "--profile-step-end", "3", "--profile-ranks", "x"]), 1)


def test_the_slowest_rank_is_of_its_stage():
    assert slowest([1.0, 1.1, 1.0, 3.0, 3.0, 3.3], 3) == Slowest(1, pytest.approx(1.1))
    assert slowest([2.0, 2.0, 5.0, 2.0], 4) == Slowest(2, 2.5)
    assert slowest([0.0, 0.0], 2) is None and slowest([2.0], 1) == Slowest(0, 1.0)


def test_a_slow_rank_is_told_once(caplog):
    watch = StragglerWatch()
    for step, ratio in enumerate([1.5, 1.5, 1.0, 1.5, 1.5, 1.6, 1.7, 1.7]):
        watch.look(step, Slowest(3, ratio))
    assert [record.getMessage() for record in caplog.records] == [
        "step 5: rank 3 is slow: its own work takes 1.60 times the median of its stage, at 3 log "
        "steps in a row"
    ]


@pytest.mark.gpu
def test_on_a_gpu_named_steps_are_eager_and_graphs_come_back(tmp_path, dataset):
    flags = [*TINY, *LLAMA, "--bf16", "--data-path", dataset, "--run-dir", str(tmp_path)]
    flags += ["--hidden-size", "256", "--ffn-hidden-size", "512", "--train-iters", "10"]
    flags += ["--seq-length", "128"]
    flags += ["--profile", "--profile-step-start", "5", "--profile-step-end", "7"]
    flags += ["--record-memory-history"]
    command = [sys.executable, str(ROOT / "launch" / "pretrain.py"), *flags]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": path})
    (trace,) = (tmp_path / "profile").glob("*.json.gz")
    events = _events(trace)
    assert sum(event["name"].endswith("linear_fc1 grad_weight") for event in events) >= 4
    assert any(event.get("cat") == "kernel" for event in events)
    assert (tmp_path / "profile" / "memory.rank0.pickle").stat().st_size > 0
