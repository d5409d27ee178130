"""The variants of compare_ast.py: how each is made of the dense model, and what is measured of it.

Every variant is made and measured in a process of its own (`compare_ast --make`), so that each
can have a GPU; what stays is VARIANT.json, small enough to travel.
"""

from __future__ import annotations

import datetime
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megasparse.megatron.import_without_compile import import_megatron

import_megatron()  # before the imports that need it

from megasparse.atomic_files import write_json
from megasparse.checkpoint.directory import list_steps
from megasparse.compress.oneshot import METHODS
from megasparse.config import load_config
from megasparse.errors import ConfigError, DataError
from megasparse.inference import quantized_model
from megasparse.inference.offline import OfflineModel, StoredRun
from tools import prune_oneshot, quantize
from tools.experiments import corpus_data, finished
from tools.experiments.run_queue import RunQueue, Start, Task, start_process

INT4 = "ast_slorb_int4"
VARIANTS = (
    *("dense", "dense_longer", *METHODS, "sr_ste", "cast"),
    *("ast", "ast_double_pruned", "ast_slorb", "ast_slorb_double_pruned", INT4),
)
# Made in this order, what takes long or is needed by others first.
ORDER = (
    "ast_slorb",
    "ast_slorb_double_pruned",
    "ast",
    "ast_double_pruned",
    "cast",
    "sr_ste",
    "dense",
    "dense_longer",
    "sparsegpt",
    "wanda",
    "magnitude",
    INT4,
)

ALONE = ["--kd-loss-weight", "0", "--lm-loss-weight", "1", "--masked-decay-ramp-iters", "none"]
SLORB = ["--slorb-k", "16"]
DOUBLE_PRUNED = ["--sparse-grad-input", "double-pruned"]
RETRAINED = {
    "dense_longer": [
        "--sparsity-recipe", "dense", "--masked-decay", "none", "--mask-update-interval", "none",
        *ALONE,
    ],
    "sr_ste": ["--sparsity-recipe", "sr_ste", *ALONE],
    # lambda only decides where momentum and decay are level; its rate is that of what AdamW trains,
    # for the weights must have the time to fall.
    "cast": [
        "--sparsity-recipe", "cast", "--masked-decay-ramp-iters", "none",
        "--kd-loss-weight", "0.33", "--lm-loss-weight", "0.67", "--kd-temperature", "1",
    ],
    "ast": [],
    "ast_double_pruned": DOUBLE_PRUNED,
    "ast_slorb": SLORB,
    "ast_slorb_double_pruned": [*SLORB, *DOUBLE_PRUNED],
}  # fmt: skip
# The config's rates are AST's. Its second moment is that of the smoothed gradient, which for noise
# is (1 - b1) / (1 + b1) times the gradient's: at b1 = 0.9 its steps are 4.4 times those of AdamW at
# the same rate, so what AdamW trains has this times the rate.
ADAMW_RATE = 4.0
Row = dict[str, Any]


@dataclass(frozen=True)
class Scale:
    """What is not in the configs; the last two are for `--plan`.

    Attributes:
        micro_batch_size: of calibration and evaluation.
        tokens_per_second: of dense training on one device.
        data_seconds: until the data are made.
    """

    text: corpus_data.Text
    calibration_samples: int
    micro_batch_size: int
    eval_iters: int
    group_size: int
    tokens_per_second: float = 0.0
    data_seconds: float = 0.0


SCALES = {
    "tiny": Scale(corpus_data.Text(1024, 4_000_000, False, 1), 64, 8, 16, 128, 25e3, 10),
    "gpu": Scale(corpus_data.Text(32_000, 300_000_000, True, 12), 128, 16, 64, 128, 480e3, 45),
    "10m": Scale(
        corpus_data.Text(4096, 650_000_000, True, 16, whole_machine=True),
        *(256, 32, 64, 128, 2e6, 90),
    ),
}


@dataclass
class Work:
    """Folders and settings of one comparison.

    Attributes:
        output: where everything goes.
        name: of the scale, in the configs' names.
        flags: of every run.
        dense_flags, retrain_flags: after them.
        start_run: begins a training.
        corpus: JSONL files; none: made.
    """

    output: Path
    name: str
    scale: Scale
    flags: list[str] = field(default_factory=list)
    dense_flags: list[str] = field(default_factory=list)
    retrain_flags: list[str] = field(default_factory=list)
    start_run: Start = start_process
    corpus: list[Path] = field(default_factory=list)

    def checkpoints(self, variant: str) -> Path:
        return self.output / variant / "checkpoints"

    def row_path(self, variant: str) -> Path:
        return self.output / f"{variant}.json"

    def training(self, variant: str) -> Task:
        """The run of a variant that has one (`dense`, or of RETRAINED)."""
        folder = self.output / variant
        if variant == "dense":
            config, flags = "", [*self.flags, *self.dense_flags]
        else:
            start = ["--load", str(self.checkpoints("dense")), "--finetune"]
            config = "_retrain"
            flags = [*start, *self.flags, *self.retrain_flags, *RETRAINED[variant]]
            if variant == "cast" or RETRAINED[variant][-len(ALONE) :] == ALONE:
                path = corpus_data.config_path(f"compare_ast_{self.name}_retrain.yaml")
                rates = load_config(["--config", str(path), *flags]).train
                flags += ["--lr", f"{ADAMW_RATE * rates.lr:g}"]
                flags += ["--min-lr", f"{ADAMW_RATE * rates.min_lr:g}"]
        arguments = corpus_data.run_arguments(
            f"compare_ast_{self.name}{config}.yaml", self.output, folder, flags
        )
        return Task("training", f"training {variant}", folder, tuple(arguments))

    def settings(self, variant: str) -> dict[str, Any]:
        """What a row depends on besides the trainings' settings."""
        chosen = ["micro_batch_size", "eval_iters"]
        chosen += ["calibration_samples"] if variant in (*METHODS, INT4) else []
        chosen += ["group_size"] if variant == INT4 else []
        return {name: getattr(self.scale, name) for name in chosen}

    def runs_of(self, variant: str) -> tuple[str, ...]:
        """The trainings that a row depends on."""
        own = {INT4: "ast_slorb"}.get(variant, variant)
        return ("dense", own) if own in RETRAINED else ("dense",)


def make(work: Work, variant: str) -> Row:
    """Make a variant and measure it; its row, which is also in VARIANT.json.

    Raises:
        MegasparseError: a step failed.
    """
    seconds, began = {}, time.monotonic()
    if variant in RETRAINED:
        train(work, work.training(variant))
    elif variant in METHODS:
        prune(work, variant)
    elif variant == INT4:
        to_int4(work)
    seconds["making"] = time.monotonic() - began
    print(f"{variant}: made in {seconds['making']:.0f} s", flush=True)
    began = time.monotonic()
    measured = measure(work, variant)
    seconds["measuring"] = time.monotonic() - began
    print(f"{variant}: measured in {seconds['measuring']:.0f} s", flush=True)
    trained = finished.read(work.output / variant)
    row = {
        "variant": variant,
        **measured,
        "perplexity": math.exp(measured["loss"]),
        "training": None if trained is None else trained.figures,
        "seconds": seconds,
        "hardware": finished.hardware(),
        "date": str(datetime.date.today()),
        "data": corpus_data.data_digest(work.output),
        "settings": work.settings(variant),
        "runs": {
            name: finished.settings_of(work.training(name).arguments)
            for name in work.runs_of(variant)
        },
    }
    write_json(work.row_path(variant), row, indent=1)
    return row


def train(work: Work, task: Task) -> None:
    """A run to its end, and its finished.json; one that has that is left as it is."""
    data = corpus_data.data_digest(work.output)
    done = finished.read(task.folder)
    if done is not None:
        finished.check(done, task.folder, task.arguments, data)
        return
    seed = load_config(task.arguments).train.seed

    def ended(task: Task, seconds: float | None) -> None:
        finished.record(task.folder, task.folder.name, seed, task.arguments, data, seconds)

    RunQueue(work.start_run).run([task], ended)


def prune(work: Work, method: str) -> None:
    """One-shot pruning of the dense model, unless it is there."""
    folder = work.checkpoints(method)
    if list_steps(folder):
        return
    arguments = ["--load", str(work.checkpoints("dense")), "--output", str(folder)]
    prune_oneshot.run(prune_oneshot.parse([*arguments, "--method", method, *_calibration(work)]))


def to_int4(work: Work) -> None:
    """AST + SLoRB in 4 bits, unless it is there."""
    folder = work.output / INT4
    if folder.exists():
        return
    arguments = ["--load", str(work.checkpoints("ast_slorb")), "--output", str(folder)]
    group = ["--group-size", str(work.scale.group_size)]
    quantize.run(quantize.parse([*arguments, *group, *_calibration(work)]))


def _calibration(work: Work) -> list[str]:
    samples = ["--calibration-samples", str(work.scale.calibration_samples)]
    return ["--micro-batch-size", str(work.scale.micro_batch_size), *samples]


def measure(work: Work, variant: str) -> Row:
    """The loss on held-out text, the same samples for every variant, and sizes.

    Float32, as stored: what is 4 bits is read back from its file.
    """
    scale = work.scale
    stored = StoredRun(work.checkpoints("ast_slorb" if variant == INT4 else variant))
    seed = load_config(work.training("dense").arguments).train.seed
    model = OfflineModel(stored, micro_batch_size=scale.micro_batch_size, seed=seed)
    folder = work.output / INT4
    model.put(quantized_model.read_quantized(folder) if variant == INT4 else stored.folded())
    linears = sum(stored.weights[name].numel() for name in stored.sparse)
    extra = sum(
        tensor.numel()
        for branch in stored.low_rank.values()
        for tensor in (branch.adapter, branch.projection)
        if tensor is not None
    )
    samples = scale.eval_iters * scale.micro_batch_size
    row = {
        "loss": model.loss(scale.eval_iters),
        "sparse_layers": len(stored.sparse),
        "low_rank_share": extra / linears if linears else 0.0,
        "parameters": sum(weight.numel() for weight in stored.weights.values()),
        "tokens_of_evaluation": samples * stored.config.model.seq_length,
        "samples_of_evaluation": model.samples(scale.eval_iters),
    }
    if variant == INT4:
        found = json.loads((folder / quantized_model.DESCRIPTION).read_text())["sizes"]
        row["sizes"] = found
        row["times_smaller_than_fp32"] = found["dense FP32"] / found["total"]
        row["linears_times_smaller_than_fp32"] = found["linears FP32"] / found["linears"]
    return row


def read_rows(work: Work, variants: Sequence[str]) -> dict[str, Row]:
    """The rows that are there, by variant, if they are this comparison's.

    Raises:
        ConfigError: one was made with other settings, or of other data.
        DataError: a file is none of these.
    """
    rows: dict[str, Row] = {}
    data = corpus_data.data_digest(work.output)
    for variant in variants:
        path = work.row_path(variant)
        if not path.exists():
            continue
        try:
            row = json.loads(path.read_text())
            settings, runs, digest = row["settings"], row["runs"], row["data"]
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path}: not what compare_ast.py writes: {error!r}") from None
        for name in work.runs_of(variant):
            finished.check_settings(runs.get(name, {}), path, work.training(name).arguments)
        for name, value in work.settings(variant).items():
            if settings.get(name) != value:
                raise ConfigError(
                    f"{path}: made with {name} {settings.get(name)!r}, this comparison has "
                    f"{value!r}: another --output, or remove it"
                )
        finished.check_data(digest, path, data)
        data = data or digest
        rows[variant] = row
    return rows
