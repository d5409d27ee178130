"""Files of metrics: whole after a restart, and the same in every writer."""

from __future__ import annotations

import sys
import types

import pytest

from megasparse.config import LoggingConfig
from megasparse.errors import ConfigError
from megasparse.metrics.schema import read_metrics
from megasparse.metrics.writers import MetricsWriter
from megasparse.preflight.settings import prepare
from tests.runs import TINY


def test_a_run_that_continues_drops_later_rows(tmp_path):
    logging = LoggingConfig(log_csv=True, log_layers=True, tensorboard_dir=str(tmp_path / "tb"))
    writer = MetricsWriter(tmp_path, logging)
    for step in (1, 2, 3):
        writer.write({"step": step, "loss": 0.5}, {"w": {"density": 0.5}})
    writer.close()
    writer = MetricsWriter(tmp_path, logging, resume_step=2)
    writer.write({"step": 3, "loss": 0.25}, {})
    writer.close()
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert [row["step"] for row in read_metrics(tmp_path / "layers.jsonl")] == [1, 2]
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert len(lines) == 4 and lines[3].split(",")[:2] == ["3", "0.25"]


def test_weights_and_biases_gets_the_same_scalars(tmp_path, monkeypatch):
    calls: list = []

    class Run:
        def log(self, scalars, step):
            calls.append((step, scalars))

        def finish(self):
            calls.append("finished")

    fake = types.SimpleNamespace(init=lambda **options: calls.append(options) or Run())
    monkeypatch.setitem(sys.modules, "wandb", fake)
    logging = LoggingConfig(wandb_project="p", tensorboard_dir=str(tmp_path / "tb"))
    for resume_step in (0, 1):
        writer = MetricsWriter(tmp_path, logging, resume_step, {"train": {"lr": 1.0}})
        writer.write({"step": 1 + resume_step, "loss": 0.5}, {"w": {"density": 0.5}})
        writer.close()
    first, row, end, second = calls[:4]
    assert first["project"] == "p" and first["name"] == tmp_path.name
    assert first["config"] == {"train": {"lr": 1.0}} and second["id"] == first["id"]
    assert row == (1, {"loss/training": 0.5, "layers_density/w": 0.5}) and end == "finished"


def test_weights_and_biases_is_asked_for_but_missing(tmp_path, dataset, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    flags = [*TINY, "--data-path", dataset, "--run-dir", str(tmp_path / "run")]
    with pytest.raises(ConfigError, match="wandb is not installed"):
        prepare([*flags, "--wandb-project", "p"], 1)
    assert not (tmp_path / "run").exists()
