"""Lines of progress."""

from __future__ import annotations

import json
import logging
import re

import pytest

from megasparse.config import LoggingConfig
from megasparse.log import logger
from megasparse.metrics import schema as metrics_module
from megasparse.metrics.schema import read_metrics
from megasparse.metrics.writers import MetricsWriter


def test_time_left_is_readable():
    texts = [metrics_module._clock(s) for s in (0, 65, 3600, 86399, 90061)]
    assert texts == ["0:00", "1:05", "1:00:00", "23:59:59", "1 d 01:01:01"]


DAMAGED = {
    1: b'{"step": 1, "loss": 0.', 4: b"\x00\xff\xfe", 5: b"[1, 2]", 6: b'{"loss": 1.0}',
    8: b"[" * 100_000, 9: b'{"step": true}', 10: b'{"step": "10"}', 11: b"9" * 5000,
}  # fmt: skip


@pytest.mark.parametrize("resumed", [False, True])
def test_a_damaged_line_costs_that_line_and_is_told(tmp_path, caplog, monkeypatch, resumed):
    """At the start, in the middle and near the end; what a kill cut off is no damage."""
    lines = [DAMAGED.get(n, json.dumps({"step": n, "loss": 0.5}).encode()) for n in range(1, 21)]
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join(lines) + b'\n{"step": 21, "lo')
    # Where an earlier test has set up the log, pytest itself listens to it.
    monkeypatch.setattr(logger, "propagate", caplog.handler not in logger.handlers)
    with caplog.at_level(logging.WARNING, logger.name):
        if resumed:
            folder = LoggingConfig(tensorboard_dir=str(tmp_path / "tb"))
            MetricsWriter(tmp_path, folder, resume_step=18).close()  # type: ignore[arg-type]
        rows = read_metrics(path)
    last = 18 if resumed else 20
    assert [row["step"] for row in rows] == [n for n in range(1, last + 1) if n not in DAMAGED]
    (told,) = caplog.messages  # after the resume the lines are gone
    assert told == f"{path}: 8 damaged lines are left out: 1, 4, 5, 6, 8, ..."


@pytest.mark.parametrize("ranks", [1, 4])
def test_rates_of_a_line_are_of_the_same_interval(caplog, monkeypatch, ranks):
    """Three steps at 1,000 tokens/s and a log step at 100, on all ranks; a token is 2 GFLOP."""
    monkeypatch.setattr(logger, "propagate", caplog.handler not in logger.handlers)
    mean = 4 * 500 / (3 * 0.5 + 5.0) / ranks
    row = {
        "step": 4,
        "loss": 1.0,
        "lr": 1e-3,
        "grad_norm": 1.0,
        "consumed_samples": 4,
        "tokens_per_second": 100.0,
        "tokens_per_second_per_gpu": mean,
        "tflops": mean * 2e9 / 1e12,
        "mfu": 0.1,
    }
    with caplog.at_level(logging.INFO, logger.name):
        metrics_module.ProgressLine(8, 0, 8, ranks).show(row)
    (line,) = caplog.messages
    (rate,) = re.findall(r"([\d,]+) tokens/s", line)
    (tflops,) = re.findall(r"([\d.]+) TFLOP/s a GPU", line)
    assert int(rate.replace(",", "")) == 308  # 2,000 tokens in 6.5 s
    assert float(tflops) * ranks == pytest.approx(308 * 2e9 / 1e12, rel=2e-3)


def test_a_line_of_a_step_that_was_not_measured_has_no_rate(caplog, monkeypatch):
    monkeypatch.setattr(logger, "propagate", caplog.handler not in logger.handlers)
    row = {"step": 1, "loss": None, "lr": 0.1, "grad_norm": None, "consumed_samples": 1}
    with caplog.at_level(logging.INFO, logger.name):
        metrics_module.ProgressLine(8, 0, 8, 1).show({**row, "tokens_per_second": 5.0})
    assert "tokens/s" not in caplog.messages[0] and "skipped" in caplog.messages[0]
