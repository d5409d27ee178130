"""Files of metrics: whole after a restart, and the same in every writer."""

from __future__ import annotations

import errno
import os
import resource
import sys
import traceback
from pathlib import Path

import pytest

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


def _fill(folder: Path, row: dict, layers: dict, limit: int) -> None:
    """Be a process that writes until no file may grow any more; its stderr is in `folder`."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    os.dup2(os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT), 2)
    sys.stderr = sys.__stderr__  # pytest has its own
    settings = LoggingConfig(tensorboard_dir=str(folder / "tb"))
    writer = MetricsWriter(folder, settings)  # type: ignore[arg-type]
    try:
        for step in range(1, 100_000):
            writer.write({**row, "step": step}, layers)
            if step % 10 == 0:
                writer.flush()
    except OSError as error:
        os._exit(error.errno or 1)
    except BaseException:
        traceback.print_exc()
    os._exit(1)


@pytest.mark.parametrize("first", ["metrics.jsonl", "TensorBoard"])
def test_a_full_disk_is_an_error_for_the_run_and_no_traceback(tmp_path, first):
    """The run tells an OSError in one line (`tests/reliability/test_faults.py`)."""
    board = first == "TensorBoard"
    layers = {f"layer {n}": {"density": 0.5} for n in range(30 * board)}
    child = os.fork()
    if child == 0:
        _fill(tmp_path, {"loss": 0.5, "note": "x" * 500 * (not board)}, layers, 1 << 15)
    _, status = os.waitpid(child, 0)
    told = (tmp_path / "stderr").read_text()
    assert os.waitstatus_to_exitcode(status) == errno.EFBIG, told
    assert "Traceback" not in told and "Exception" not in told
    sizes = [path.stat().st_size for path in (tmp_path / "tb").iterdir()]
    rows = (tmp_path / "metrics.jsonl").stat().st_size
    assert (max(sizes) > 30_000) == board and (rows > 30_000) != board
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["step"] == 1
