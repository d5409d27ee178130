"""Where rows go: metrics.jsonl and the trackers; CSV and the figures of layers by a flag.

Only rank 0 writes. A run that continues drops what was recorded after its checkpoint, so that no
step appears twice.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from megasparse.atomic_files import write_text
from megasparse.config import ResolvedLogging
from megasparse.metrics.schema import METRICS, read_metrics
from megasparse.metrics.trackers import open_trackers

Row = dict[str, Any]
Layers = dict[str, dict[str, float]]


class MetricsWriter:
    """All files of one run.

    Args:
        run_dir: folder of the run.
        logging: which files.
        resume_step: steps already recorded that stay.
        settings: of the run by group, for the trackers.
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
        self._samples: TextIO | None = None
        if logging.sample_tokens:
            path = run_dir / "samples.jsonl"
            self._samples = _reopen(path, map(_line, _rows_until(path, resume_step)))
        self._trackers = open_trackers(run_dir, logging, resume_step, settings)

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
        for name, loss in (row.get("valid_losses") or {}).items():
            scalars[f"curves/validation_loss_{name}"] = loss
        for name, value in (row.get("tasks") or {}).items():
            scalars[f"evaluation/{name.replace('/', '_')}"] = value
        for name, figures in (layers or {}).items():
            scalars |= {f"z_layers_{figure}/{name}": value for figure, value in figures.items()}
        for tracker in self._trackers:
            tracker.scalars(row["step"], scalars)

    def samples(self, step: int, prompts: Sequence[str], texts: Sequence[str]) -> None:
        """Texts that the model has written, one for each prompt; shown with the curves."""
        for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            if self._samples is not None:
                self._samples.write(_line({"step": step, "prompt": prompt, "text": text}))
            tag = "samples" if len(texts) == 1 else f"samples/{number}"
            for tracker in self._trackers:
                tracker.text(step, tag, text)

    def flush(self) -> None:
        """Hand everything to the system, so that a killed process loses nothing up to here."""
        for stream in (self._rows, self._layers, self._csv, self._samples):
            if stream is not None:
                stream.flush()
        for tracker in self._trackers:
            tracker.flush()

    def close(self) -> None:
        """Flush everything to disk."""
        for stream in (self._rows, self._layers, self._csv, self._samples):
            if stream is not None:
                stream.close()
        for tracker in self._trackers:
            tracker.close()


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
