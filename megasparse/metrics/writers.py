"""Where rows go: metrics.jsonl and TensorBoard always; CSV, layers and Weights & Biases by flag.

Only rank 0 writes. A run that continues drops what was recorded after its checkpoint, so that no
step appears twice.
"""

from __future__ import annotations

import csv
import io
import json
import secrets
import threading
from pathlib import Path
from typing import Any, TextIO

from torch.utils.tensorboard import SummaryWriter

from megasparse.atomic_files import write_text
from megasparse.config import ResolvedLogging
from megasparse.metrics.schema import METRICS, read_metrics

Row = dict[str, Any]
Layers = dict[str, dict[str, float]]


class MetricsWriter:
    """All files of one run.

    Args:
        run_dir: folder of the run.
        logging: which files.
        resume_step: steps already recorded that stay.
        settings: of the run, for Weights & Biases.
    """

    def __init__(
        self,
        run_dir: Path,
        logging: ResolvedLogging,
        resume_step: int = 0,
        settings: dict[str, Any] | None = None,
    ) -> None:
        kept = _rows_until(run_dir / "metrics.jsonl", resume_step)
        self._rows = _reopen(run_dir / "metrics.jsonl", map(_line, kept))
        self._layers: TextIO | None = None
        if logging.log_layers:
            path = run_dir / "layers.jsonl"
            self._layers = _reopen(path, map(_line, _rows_until(path, resume_step)))
        self._csv: TextIO | None = None
        if logging.log_csv:
            lines = [_csv_line({m.key: m.key for m in METRICS}), *map(_csv_line, kept)]
            self._csv = _reopen(run_dir / "metrics.csv", lines)
        _leave_disk_errors_to_the_run()
        self._board = SummaryWriter(logging.tensorboard_dir, purge_step=resume_step + 1)
        self._wandb: Any = None
        if logging.wandb_project:
            self._wandb = _start_wandb(run_dir, logging, resume_step > 0, settings)

    def write(self, row: Row, layers: Layers | None = None) -> None:
        """Record one step.

        Args:
            row: has "step"; values JSON can hold.
            layers: figures by layer name.
        """
        self._rows.write(_line(row))
        if self._csv is not None:
            self._csv.write(_csv_line(row))
        for name, figures in (layers or {}).items():
            if self._layers is not None:
                self._layers.write(_line({"step": row["step"], "layer": name, **figures}))
        scalars = {m.tag: row[m.key] for m in METRICS if m.tag and row.get(m.key) is not None}
        for name, figures in (layers or {}).items():
            scalars |= {f"layers_{figure}/{name}": value for figure, value in figures.items()}
        for tag, value in scalars.items():
            self._board.add_scalar(tag, value, row["step"])
        if self._wandb is not None:
            self._wandb.log(scalars, step=row["step"])

    def flush(self) -> None:
        """Hand everything to the system, so that a killed process loses nothing up to here."""
        for stream in (self._rows, self._layers, self._csv):
            if stream is not None:
                stream.flush()
        self._board.flush()

    def close(self) -> None:
        """Flush everything to disk."""
        for stream in (self._rows, self._layers, self._csv):
            if stream is not None:
                stream.close()
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def _leave_disk_errors_to_the_run() -> None:
    """TensorBoard's thread must not print a traceback when the disk is full.

    The error is raised by the next `add_scalar` as well, and is one line of the run's there.
    """
    before = threading.excepthook

    def hook(what: threading.ExceptHookArgs) -> None:
        board = type(what.thread).__name__ == "_AsyncWriterThread"
        if not (board and isinstance(what.exc_value, OSError)):
            before(what)

    threading.excepthook = hook


def _start_wandb(
    run_dir: Path, logging: ResolvedLogging, resumed: bool, settings: dict[str, Any] | None
) -> Any:
    """A run of Weights & Biases; one that is continued there when this one is."""
    import wandb  # optional: `preflight.settings` refuses the flag without it

    folder = Path(logging.wandb_save_dir or run_dir / "wandb")
    folder.mkdir(parents=True, exist_ok=True)
    known = folder / "run_id"
    if not (resumed and known.exists()):
        write_text(known, secrets.token_hex(8))
    return wandb.init(
        id=known.read_text(),
        project=logging.wandb_project,
        entity=logging.wandb_entity,
        name=logging.wandb_exp_name or run_dir.name,
        dir=str(folder),
        config=settings,
        resume="allow",
    )


def _rows_until(path: Path, step: int) -> list[Row]:
    return [row for row in read_metrics(path) if row["step"] <= step]


def _reopen(path: Path, lines: Any) -> TextIO:
    """The file with these lines alone, open for more; replaced by one rename."""
    write_text(path, "".join(lines))
    return open(path, "a", buffering=1, encoding="utf-8")


def _line(row: Row) -> str:
    return json.dumps(row) + "\n"


def _csv_line(row: Row) -> str:
    """A column for every metric; what a row does not have is empty."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow([row.get(m.key) for m in METRICS])
    return text.getvalue()
