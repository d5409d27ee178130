"""How long compare_ast.py takes: its stages with estimated minutes, before anything is run."""

from __future__ import annotations

from dataclasses import dataclass

from megasparse.compress.oneshot import METHODS
from megasparse.config import load_config
from megasparse.config.batches import DEFAULT_ITERS
from tools.experiments.ast_variants import INT4, ORDER, RETRAINED, Work

# Shares of a dense run's tokens/s: 2:4 as measured on an H200 (GPT-2 124M); with a teacher's
# forward pass and the divergence, and with SLoRB's two small products, as their FLOPs suggest.
RATES = {
    "dense_longer": 1.0,
    "sr_ste": 0.94,
    "cast": 0.75,
    "ast": 0.62,
    "ast_double_pruned": 0.62,
    "ast_slorb": 0.52,
    "ast_slorb_double_pruned": 0.52,
}
DATA_PARALLEL = 0.93  # of as many times one device
FLOAT32 = 0.25  # tokens/s of a forward pass in float32 (offline) to those of bf16 training
START, SAVE = 25.0, 8.0  # seconds: of a process until its first step; of a checkpoint


@dataclass(frozen=True)
class Stage:
    """One part of the comparison.

    Attributes:
        begin, end: seconds after the start.
        device: of a variant; None: all.
    """

    name: str
    what: str
    begin: float
    end: float
    device: int | None = None


def stages(work: Work, jobs: int, rate: float) -> list[Stage]:
    """Everything, if nothing is there yet.

    Args:
        jobs: devices.
        rate: tokens/s of dense training on one.
    """
    config = load_config(work.training("dense").arguments)
    tokens = _tokens(work, "dense")
    saves = (config.train.train_iters or DEFAULT_ITERS) // (
        config.checkpoint.save_interval or 10**9
    ) + 1
    together = rate if jobs == 1 else DATA_PARALLEL * jobs * rate
    data = work.scale.data_seconds
    dense = data + START + tokens / together + SAVE * saves
    found = [
        Stage("data", "corpus, tokenizer, tokens", 0.0, data),
        Stage("training dense", f"{tokens / 1e6:.0f}M tokens on {jobs}", data, dense),
    ]
    free = [dense] * jobs
    for name in ORDER:
        device = free.index(min(free))
        begin = max(free) if name == INT4 else free[device]
        seconds, what = _variant(work, name, rate)
        free[device] = begin + seconds
        found.append(Stage(name, what, begin, free[device], device))
    return found


def _tokens(work: Work, variant: str) -> int:
    config = load_config(work.training(variant).arguments)
    batch = config.train.global_batch_size or config.train.micro_batch_size
    return (config.train.train_iters or DEFAULT_ITERS) * batch * config.model.seq_length


def _variant(work: Work, name: str, rate: float) -> tuple[float, str]:
    """Seconds of making and measuring one, and what is done."""
    scale, offline = work.scale, FLOAT32 * rate
    length = load_config(work.training("dense").arguments).model.seq_length
    evaluation = scale.eval_iters * scale.micro_batch_size * length
    seconds, what = START + evaluation / offline, "measured"
    if name in RETRAINED:
        tokens = _tokens(work, name)
        seconds += START + tokens / (RATES[name] * rate) + SAVE
        what = f"{tokens / 1e6:.1f}M tokens, measured"
    elif name in (*METHODS, INT4):
        count = scale.micro_batch_size if name == "magnitude" else scale.calibration_samples
        # Every layer sees the samples twice; SAVE also for going through the columns.
        seconds += 2 * count * length / offline + 2 * SAVE
        what = f"{count} calibration samples, measured"
    return seconds, what


def text(found: list[Stage], jobs: int, rate: float) -> str:
    """A line a stage, and the whole."""
    lines = [f"Estimates for {jobs} devices and {rate:,.0f} tokens/s of dense training on one:"]
    for stage in found:
        where = "" if stage.device is None else f"device {stage.device}"
        lines.append(
            f"{stage.begin / 60:6.1f} to {stage.end / 60:5.1f} min  {stage.name:<15} {where:<9} "
            f"{stage.what}"
        )
    return "\n".join([*lines, f"{max(stage.end for stage in found) / 60:.1f} minutes in all"])
