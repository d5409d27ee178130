"""Files of metrics: whole after a restart, and the same in every writer."""

from __future__ import annotations

from megasparse.config import LoggingConfig
from megasparse.metrics.schema import read_metrics
from megasparse.metrics.writers import MetricsWriter


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
