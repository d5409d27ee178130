"""What a run says about itself: the figures of a row, how rows are read, and lines on the screen.

A row is one optimizer step. Figures marked "log step" are in the rows of the first step, of every
`--log-interval`-th and of the last one.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megasparse.input_files import read_regular
from megasparse.log import logger
from megasparse.timer import PHASES


@dataclass(frozen=True)
class Metric:
    """One figure of a row.

    Attributes:
        key: in metrics.jsonl, metrics.csv and (as `tag`) elsewhere.
        tag: in TensorBoard and Weights & Biases; None: not there.
        unit: "1" for ratios.
        meaning: how it is computed.
    """

    key: str
    tag: str | None
    unit: str
    meaning: str


_STEP = (
    ("step", None, "1", "optimizer steps done"),
    ("loss", "curves/loss", "nat/token", "mean over the global batch"),
    (
        "valid_loss",
        "curves/validation_loss",
        "nat/token",
        "after `--eval-interval` steps and at the end",
    ),
    ("lr", "curves/learning_rate", "1", "of this step"),
    ("grad_norm", "training/grad_norm", "1", "of the whole model before clipping"),
    ("masked_decay", "sparsity/masked_decay", "1",
     "lambda of this step; with `--masked-decay-rho` the mean over layers of the first stage"),
    ("flip_rate", "sparsity/flip_rate", "1", "of the latest mask refresh, all flips / all entries"),
    ("density", "sparsity/density", "1", "non-zeros of the weights in use, mean over layers"),
    ("sparse", None, "-", "whether the step is in a sparse phase"),
    ("preparations", None, "1", "most times a weight's operands were built in the step"),
    ("consumed_samples", None, "sequences", "since the first step"),
    ("global_batch_size", "training/global_batch_size", "sequences", "of this step"),
    ("samples", None, "-", "digest of the ids of the step's samples"),
    ("tokens_per_second", "curves/tokens_per_second", "token/s", "of this step, all ranks"),
)  # fmt: skip
_TEACHER = (
    ("kd_loss", "loss/kl_to_teacher", "nat/token", "KL to the teacher"),
    (
        "lm_loss",
        "loss/cross_entropy",
        "nat/token",
        "beside it; loss is their weighted sum. BERT: of masked tokens",
    ),
)
_BERT = (
    ("sop_loss", "loss/order", "nat/sample", "of the order of two segments, beside lm_loss"),
    ("accuracy", "training/accuracy", "1", "fine-tuning: share of the batch in the right class"),
    ("valid_lm_loss", "loss/validation_cross_entropy", "nat/token", "lm_loss with valid_loss"),
    ("valid_sop_loss", "loss/validation_order", "nat/sample", "sop_loss with valid_loss"),
    ("valid_accuracy", "evaluation/accuracy", "1", "accuracy with valid_loss"),
)
_LOG_STEP = (
    ("tokens_per_second_per_gpu", "throughput/tokens_per_second_per_gpu", "token/s",
     "mean since the log step before"),
    ("tflops", "throughput/tflops", "TFLOP/s", "dense-equivalent, of a GPU, same interval"),
    ("tflops_true", "throughput/tflops_true", "TFLOP/s",
     "executed by a GPU: with recomputation, without what sparse tensor cores saved"),
    ("mfu", "throughput/mfu", "1", "tflops / dense peak of the GPU in the precision in use"),
    ("memory_gib", "memory/peak_gib", "GiB",
     "peak so far: allocated on the GPU, or resident on a CPU; largest rank"),
    *((f"time_{phase}", f"time/{phase}", "s", "of the step before, mean over ranks")
      for phase in PHASES),
    ("time_slowest_rank", None, "-", "rank whose own work takes longest, compared with its stage"),
    ("time_slowest_ratio", "time/slowest_ratio", "1",
     "time of its own work in the step before / median of its stage; without communication"),
    ("retained_l1", "sparsity/retained_l1", "1", "sum abs(W o M) / sum abs(W), mean over layers"),
    ("double_pruned", "sparsity/double_pruned", "1",
     "of a double-pruned grad_input: norm(W~ - W~_d)^2 / norm(W~)^2, mean over layers"),
    ("decay_ratio", "sparsity/decay_ratio", "1",
     "norm of lambda (1 - M) o W / norm of the clipped gradient, mean over layers"),
    ("mvue_amplification", "sparsity/mvue_amplification", "1",
     "sum of squares of MVUE(dZ) / of dZ in the step, mean over layers"),
    ("mvue_variance", "sparsity/mvue_variance", "1",
     "expected sum of squares of MVUE(dZ) - dZ / of dZ, mean over layers"),
    ("scale", "sparsity/scale", "1", "beta of S-STE, mean over layers"),
    ("load_balancing_loss", "experts/load_balancing_loss", "1",
     "of the router, without its coefficient: 1 is balance; mean over layers with experts"),
    ("z_loss", "experts/z_loss", "1",
     "mean square of the router's log-sum-exp, without its coefficient, mean over layers"),
    ("fp8_amax", "fp8/amax", "1", "largest magnitude of any FP8 operand before scaling"),
    ("fp8_saturated", "fp8/saturated", "1",
     "share of entries rounded to the format's largest value, worst operand"),
    ("fp8_lost", "fp8/lost", "1", "share of entries that FP8 made zero, worst operand"),
)  # fmt: skip

STEP_METRICS = tuple(Metric(*entry) for entry in _STEP)
TEACHER_METRICS = tuple(Metric(*entry) for entry in _TEACHER)
LOG_METRICS = tuple(Metric(*entry) for entry in _LOG_STEP)
BERT_METRICS = tuple(Metric(*entry) for entry in _BERT)
METRICS = STEP_METRICS + TEACHER_METRICS + BERT_METRICS + LOG_METRICS


_MAX_BYTES = 1 << 36  # of a run of a hundred million steps


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl or layers.jsonl; a damaged line costs that line, and is told.

    A last line that was cut off, as a killed process leaves it, is left out without a word.
    """
    if not path.exists():
        return []
    rows, damaged = [], []
    lines = read_regular(path, _MAX_BYTES).decode("utf-8", "replace").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and type(row.get("step")) is int:
            rows.append(row)
        elif line.strip() and number < len(lines):
            damaged.append(number)
    if damaged:
        shown = ", ".join(map(str, damaged[:5])) + (", ..." if len(damaged) > 5 else "")
        logger.warning("%s: %d damaged lines are left out: %s", path, len(damaged), shown)
    return rows


class ProgressLine:
    """One line an interval: loss, lr, tokens/s, flip rate, time left.

    Rates are means since the log step before: a log step alone is slower, as it is measured.

    Args:
        train_iters: steps of the run.
        start_samples, end_samples: consumed before the first step of this start, and at the end.
        ranks: of the run.
    """

    def __init__(self, train_iters: int, start_samples: int, end_samples: int, ranks: int) -> None:
        self._train_iters, self._ranks = train_iters, ranks
        self._start, self._end, self._begin = start_samples, end_samples, time.monotonic()

    def show(self, row: dict[str, Any]) -> None:
        """Log a row as one line."""
        # By samples: a step takes longer when its batch has grown.
        done, to_do = row["consumed_samples"] - self._start, self._end - row["consumed_samples"]
        left = (time.monotonic() - self._begin) / max(done, 1) * to_do
        parts = [
            f"step {row['step']:>{len(str(self._train_iters))}}/{self._train_iters}",
            f"loss {row['loss']:.4f}" if row["loss"] is not None else "skipped",
            f"lr {row['lr']:.2e}",
            f"grad norm {row['grad_norm'] or 0.0:.3f}",
        ]
        each = row.get("tokens_per_second_per_gpu")
        if each is not None:
            parts.append(f"{each * self._ranks:,.0f} tokens/s")
        if row.get("mfu") is not None:
            parts.append(f"{row['tflops']:.4g} TFLOP/s a GPU, MFU {row['mfu']:.1%}")
        if row.get("flip_rate") is not None:
            parts.append(f"flip rate {row['flip_rate']:.4f}")
        if row.get("valid_loss") is not None:
            parts.append(f"validation {row['valid_loss']:.4f}")
        if row.get("valid_accuracy") is not None:
            parts.append(f"accuracy {row['valid_accuracy']:.4f}")
        for name, loss in (row.get("valid_losses") or {}).items():
            parts.append(f"{name} {loss:.4f}")
        logger.info("%s", " | ".join([*parts, f"ETA {_clock(int(left))}"]))


def _clock(seconds: int) -> str:
    """`0:12`, `3:04:05`, `2 d 03:04:05`."""
    minutes, hours = seconds // 60 % 60, seconds // 3600
    if hours >= 24:
        return f"{hours // 24} d {hours % 24:02d}:{minutes:02d}:{seconds % 60:02d}"
    if hours:
        return f"{hours}:{minutes:02d}:{seconds % 60:02d}"
    return f"{minutes}:{seconds % 60:02d}"
