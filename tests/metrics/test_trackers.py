"""Trackers: what a person sees first, and the same values in each of them."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megasparse.config import LoggingConfig
from megasparse.errors import ConfigError
from megasparse.log import logger
from megasparse.metrics import trackers
from megasparse.metrics.schema import METRICS, read_metrics
from megasparse.metrics.trackers import TRACKERS
from megasparse.metrics.writers import MetricsWriter
from megasparse.preflight.settings import _TRACKERS

SETTINGS = {"train": {"lr": 1.0, "bf16": True, "exit_interval": None}, "data": {"split": "9,1,0"}}
FIRST = {"loss", "validation_loss", "learning_rate", "tokens_per_second"}


def _write(folder: Path, **settings: object) -> None:
    """Two starts of a run: three steps, the last of them anew, with layers and a text."""
    logging = LoggingConfig(tensorboard_dir=str(folder / "tb"), sample_tokens=2, **settings)  # type: ignore[arg-type]
    for resume_step, steps in ((0, (1, 2)), (1, (2, 3))):
        writer = MetricsWriter(folder, logging, resume_step, SETTINGS)  # type: ignore[arg-type]
        for step in steps:
            every = {m.key: 0.5 * step for m in METRICS if m.tag}
            writer.write({**every, "step": step}, {"w": {"density": 0.5}})
        writer.samples(steps[-1], ["def", ""], ["def <main>", "</pre>"])
        writer.flush()
        writer.close()


def test_tensorboards_first_screen_is_the_run_and_layers_come_last(tmp_path):
    _write(tmp_path)
    board = EventAccumulator(str(tmp_path / "tb"))
    board.Reload()
    tags = board.Tags()["scalars"]
    groups = list(dict.fromkeys(tag.split("/")[0] for tag in sorted(tags)))
    assert groups[0] == "curves" and groups[-1] == "z_layers_density"
    assert {tag.split("/")[1] for tag in tags if tag.startswith("curves/")} == FIRST
    assert [event.value for event in board.Scalars("curves/loss")][-3:] == [0.5, 1.0, 1.5]
    plugins = board.summary_metadata
    assert "samples/0/text_summary" in plugins and "settings/text_summary" in plugins
    assert any("hparams" in name for name in plugins)
    kept = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [(one["step"], one["text"]) for one in kept] == [(3, "def <main>"), (3, "</pre>")]


def test_weights_and_biases_offline_gets_them(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    _write(tmp_path, wandb_project="p", wandb_exp_name="mine")
    runs = list((tmp_path / "wandb").glob("wandb/offline-run-*/*.wandb"))
    assert len(runs) == 2  # two starts of one run, which `wandb sync` joins
    ident = (tmp_path / "wandb" / "run_id").read_text()
    wanted = [w.encode() for w in (ident, "curves/loss", "z_layers_density/w", "mine")]
    for run in runs:
        end = time.monotonic() + 60  # its own process writes
        while any(word not in run.read_bytes() for word in wanted) and time.monotonic() < end:
            time.sleep(0.1)
        assert not [word for word in wanted if word not in run.read_bytes()]


def test_mlflow_gets_them(tmp_path):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    _write(tmp_path, mlflow_experiment="e", mlflow_run_name="mine")
    client = mlflow.MlflowClient(tracking_uri=(tmp_path / "mlflow").as_uri())
    run = client.get_run((tmp_path / "mlflow" / "run_id").read_text())
    assert run.info.run_name == "mine" and run.info.status == "FINISHED"
    assert run.data.params == {"lr": "1.0", "bf16": "True", "split": "9,1,0"}
    history = {m.step: m.value for m in client.get_metric_history(run.info.run_id, "curves/loss")}
    assert history == {1: 0.5, 2: 1.0, 3: 1.5}
    assert run.data.metrics["z_layers_density/w"] == 0.5
    texts = {one.path for one in client.list_artifacts(run.info.run_id)}
    assert texts == {f"samples-{number}-{step}.txt" for number in (0, 1) for step in (2, 3)}


class _Failing:
    """A service whose disk is full, or whose server is gone, after its first values."""

    def __init__(self, error: Exception) -> None:
        self.error, self.calls = error, 0

    def scalars(self, step: int, values: object) -> None:
        self.calls += 1
        if step > 1:
            raise self.error

    def text(self, *_: object) -> None:
        raise self.error

    flush = close = text


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("a\nb")])
def test_a_service_that_fails_is_told_once_and_the_run_goes_on(
    monkeypatch, caplog, error, tmp_path
):
    failing = _Failing(error)
    monkeypatch.setattr(trackers, "TRACKERS", ((*TRACKERS[1][:2], lambda *_: failing),))
    monkeypatch.setattr(logger, "propagate", False)
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    writer = MetricsWriter(tmp_path, LoggingConfig(wandb_project="p"))  # type: ignore[arg-type]
    for step in range(1, 6):
        writer.write({"step": step, "loss": 0.5})
    writer.samples(5, ["a"], ["text"])
    writer.flush()
    writer.close()
    (told,) = caplog.messages
    assert told.startswith("wandb failed, and gets no more of this run") and "\n" not in told
    assert failing.calls == 2 and len(read_metrics(tmp_path / "metrics.jsonl")) == 5


def test_a_service_that_does_not_begin_is_one_error(monkeypatch, tmp_path):
    def refuse(*_: object) -> None:
        raise RuntimeError("no API key\nconfigured")

    monkeypatch.setattr(trackers, "TRACKERS", ((*TRACKERS[1][:2], refuse),))
    words = "wandb_project 'p': wandb does not begin a run: no API key configured"
    with pytest.raises(ConfigError, match=words):
        MetricsWriter(tmp_path, LoggingConfig(wandb_project="p"))  # type: ignore[arg-type]


def test_the_list_and_the_checks_name_the_same_packages():
    assert {name: package for name, package, _ in TRACKERS if name} == _TRACKERS
