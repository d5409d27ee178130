"""What a run says about itself: metrics.jsonl, TensorBoard, and lines on the screen.

One JSON object a step with full float precision; the same figures as TensorBoard scalars; one line
an interval for people. Only rank 0 writes.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from megasparse.log import logger

# Scalars by their names in TensorBoard.
_TENSORBOARD = {
    "loss": "loss/training",
    "valid_loss": "loss/validation",
    "kd_loss": "loss/kl_to_teacher",
    "lm_loss": "loss/cross_entropy",
    "lr": "optimizer/learning_rate",
    "grad_norm": "optimizer/grad_norm",
    "masked_decay": "sparsity/masked_decay",
    "flip_rate": "sparsity/flip_rate",
    "density": "sparsity/density",
    "tokens_per_second": "throughput/tokens_per_second",
}


class MetricsWriter:
    """The files of one run.

    Args:
        run_dir: folder of the run.
        tensorboard_dir: folder of the event files.
        resume_step: steps already recorded that stay; later ones (of a run that was cut off after
            its checkpoint) are dropped, so that no step appears twice.
    """

    def __init__(self, run_dir: Path, tensorboard_dir: Path, resume_step: int = 0) -> None:
        self.path = run_dir / "metrics.jsonl"
        kept = [row for row in read_metrics(self.path) if row["step"] <= resume_step]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
        temporary.replace(self.path)
        self._stream = open(self.path, "a", buffering=1)  # noqa: SIM115 (closed in close)
        self._board = SummaryWriter(str(tensorboard_dir), purge_step=resume_step + 1)

    def write(self, row: dict[str, Any], layers: dict[str, dict[str, float]] | None = None) -> None:
        """Record one step.

        Args:
            row: has "step"; values JSON can hold.
            layers: figures by layer name, for TensorBoard.
        """
        self._stream.write(json.dumps(row) + "\n")
        step = row["step"]
        for key, tag in _TENSORBOARD.items():
            if row.get(key) is not None:
                self._board.add_scalar(tag, row[key], step)
        for name, figures in (layers or {}).items():
            for figure, value in figures.items():
                self._board.add_scalar(f"layers_{figure}/{name}", value, step)

    def flush(self) -> None:
        """Hand everything to the system, so that a killed process loses nothing up to here."""
        self._stream.flush()
        self._board.flush()

    def close(self) -> None:
        """Flush everything to disk."""
        self._stream.close()
        self._board.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line that was cut off is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            break
        rows.append(row)
    return rows


class ProgressLine:
    """One line an interval: loss, lr, tokens/s, flip rate, time left."""

    def __init__(self, train_iters: int, start_step: int) -> None:
        self._train_iters = train_iters
        self._start, self._begin = start_step, time.monotonic()

    def show(self, row: dict[str, Any]) -> None:
        done = row["step"] - self._start
        left = (time.monotonic() - self._begin) / max(done, 1) * (self._train_iters - row["step"])
        parts = [
            f"step {row['step']:>{len(str(self._train_iters))}}/{self._train_iters}",
            f"loss {row['loss']:.4f}" if row["loss"] is not None else "left out",
            f"lr {row['lr']:.2e}",
            f"grad norm {row['grad_norm'] or 0.0:.3f}",
            f"{row['tokens_per_second']:,.0f} tokens/s",
        ]
        if row.get("flip_rate") is not None:
            parts.append(f"flip rate {row['flip_rate']:.4f}")
        if row.get("valid_loss") is not None:
            parts.append(f"validation {row['valid_loss']:.4f}")
        minutes, seconds = divmod(int(left), 60)
        logger.info("%s", " | ".join([*parts, f"ETA {minutes}:{seconds:02d}"]))
