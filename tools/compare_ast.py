"""AST's comparison: one dense model, and every way of making it 2:4, on the same held-out text.

    python tools/compare_ast.py --scale tiny --output runs/compare_ast_tiny      # CPU, minutes
    python tools/compare_ast.py --scale gpu --output runs/compare_ast_gpu        # one H200

Makes a corpus (or takes --corpus), a tokenizer and a dataset, pre-trains a dense GPT on it, and
compares on the validation split:

    dense              | the model itself
    dense_longer       | retrained densely: what the additional training alone is worth
    magnitude          | pruned once, no training
    wanda              | the same, by |w| times the norm of its input
    sparsegpt          | the same, later columns make up for pruned ones
    sr_ste             | retrained by SR-STE, cross entropy alone
    ast                | retrained by AST: annealed decay, distillation from the dense model
    ast_slorb          | with SLoRB's low-rank branch
    ast_slorb_int4     | and quantised to 4 bits

Writes results.json, results.md and results.png into --output. Restartable: what is finished is not
repeated, an interrupted training goes on from its last checkpoint. The settings of the two kinds of
training are configs/compare_ast_SCALE.yaml and configs/compare_ast_SCALE_retrain.yaml.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import comparison
import plots
import prune_oneshot
import quantize
import torch

import megasparse
from megasparse.compress.oneshot import METHODS
from megasparse.errors import MegasparseError
from megasparse.train.catalog import list_steps
from megasparse.train.offline import OfflineModel, StoredRun

INT4 = "ast_slorb_int4"
VARIANTS = ("dense", "dense_longer", *METHODS, "sr_ste", "ast", "ast_slorb", INT4)


@dataclass(frozen=True)
class Scale:
    """What is not in the configs."""

    text: comparison.Text
    calibration_samples: int
    micro_batch_size: int
    eval_iters: int
    group_size: int


SCALES = {
    "tiny": Scale(comparison.Text(1024, 4_000_000, False, 1), 64, 8, 16, 128),
    "gpu": Scale(comparison.Text(32_000, 1_000_000_000, True, 12), 256, 16, 64, 128),
}

ALONE = ["--kd-loss-weight", "0", "--lm-loss-weight", "1", "--masked-decay-ramp-iters", "none"]
RETRAINED = {
    "dense_longer": [
        "--sparsity-recipe", "dense", "--masked-decay", "none", "--mask-update-interval", "none",
        *ALONE,
    ],
    "sr_ste": ["--sparsity-recipe", "sr_ste", *ALONE],
    "ast": [],
    "ast_slorb": ["--slorb-k", "16"],
}  # fmt: skip


@dataclass
class Comparison:
    """Folders and settings of one comparison.

    Attributes:
        output: where everything goes.
        dense_flags, retrain_flags: after those of the configs.
        launch: runs launch/pretrain.py with flags; raises if it fails.
        command: for the table.
    """

    output: Path
    name: str
    scale: Scale
    dense_flags: list[str]
    retrain_flags: list[str]
    launch: Callable[[list[str]], None]
    corpus: list[Path]
    command: str = "python tools/compare_ast.py"

    def checkpoints(self, variant: str) -> Path:
        return self.output / variant / "checkpoints"


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    flags = {
        kind: ["--train-iters", str(steps)] if steps else []
        for kind, steps in (("dense", args.dense_iters), ("retrain", args.retrain_iters))
    }
    work = Comparison(
        args.output, args.scale, SCALES[args.scale], flags["dense"], flags["retrain"],
        comparison.subprocess_launch, args.corpus,
        " ".join(["python tools/compare_ast.py", *(sys.argv[1:] if argv is None else argv)]),
    )  # fmt: skip
    try:
        rows = compare(work)
    except MegasparseError as error:
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    print(markdown(rows, work))
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", choices=SCALES, default="tiny")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--corpus", type=Path, nargs="+", default=[], help="JSONL; default: made")
    parser.add_argument("--dense-iters", type=int, help="steps instead of the config's")
    parser.add_argument("--retrain-iters", type=int, help="steps instead of the config's")
    return parser.parse_args(argv)


def compare(work: Comparison) -> list[dict]:
    """All variants, what is missing of them; a row each, also in results.json."""
    work.output.mkdir(parents=True, exist_ok=True)
    comparison.make_data(work.output, work.scale.text, work.corpus)
    rows = []
    for variant in VARIANTS:
        path = work.output / f"{variant}.json"
        if not path.exists():
            print(f"{variant} ...", flush=True)
            row = {"variant": variant, **make(work, variant)}
            row["perplexity"] = math.exp(row["loss"])
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(row, indent=1) + "\n")
            os.replace(temporary, path)
        rows.append(json.loads(path.read_text()))
    (work.output / "results.json").write_text(json.dumps(rows, indent=1) + "\n")
    (work.output / "results.md").write_text(markdown(rows, work))
    if plots.available():
        plots.perplexities(
            work.output / "results.png", [(row["variant"], row["perplexity"]) for row in rows]
        )
    return rows


def make(work: Comparison, variant: str) -> dict:
    """One variant and its figures."""
    scale, dense = work.scale, work.checkpoints("dense")
    common = [
        "--micro-batch-size", str(scale.micro_batch_size),
        "--calibration-samples", str(scale.calibration_samples),
    ]  # fmt: skip
    if variant in METHODS:
        folder = work.checkpoints(variant)
        if not list_steps(folder):
            arguments = ["--load", str(dense), "--output", str(folder), "--method", variant]
            prune_oneshot.run(prune_oneshot.parse([*arguments, *common]))
    elif variant == INT4:
        return quantized(work, common)
    elif variant == "dense":
        train(work, variant, "", work.dense_flags)
    else:
        flags = ["--load", str(dense), "--finetune", *work.retrain_flags, *RETRAINED[variant]]
        train(work, variant, "_retrain", flags)
    stored = StoredRun(work.checkpoints(variant))
    model = OfflineModel(stored, micro_batch_size=scale.micro_batch_size)
    model.put(stored.folded())
    linears = sum(stored.weights[name].numel() for name in stored.sparse)
    extra = sum(
        tensor.numel()
        for branch in stored.low_rank.values()
        for tensor in (branch.adapter, branch.projection)
        if tensor is not None
    )
    return {
        "loss": model.loss(scale.eval_iters),
        "sparse_layers": len(stored.sparse),
        "low_rank_share": extra / linears if linears else 0.0,
        "steps": stored.reader.meta["step"],
        "parameters": sum(weight.numel() for weight in stored.weights.values()),
        "tokens_of_evaluation": scale.eval_iters * scale.micro_batch_size
        * stored.config.model.seq_length,
    }  # fmt: skip


def quantized(work: Comparison, common: list[str]) -> dict:
    """AST + SLoRB in 4 bits, read back from its file."""
    folder = work.output / INT4
    if not folder.exists():
        quantize.run(
            quantize.parse(
                ["--load", str(work.checkpoints("ast_slorb")), "--output", str(folder),
                 "--group-size", str(work.scale.group_size), *common]
            )
        )  # fmt: skip
    stored = StoredRun(work.checkpoints("ast_slorb"))
    model = OfflineModel(stored, micro_batch_size=work.scale.micro_batch_size)
    model.put(quantize.read_quantized(folder))
    found = json.loads((folder / quantize.DESCRIPTION).read_text())["sizes"]
    return {
        "loss": model.loss(work.scale.eval_iters),
        "times_smaller_than_fp32": found["dense FP32"] / found["total"],
        "linears_times_smaller_than_fp32": found["linears FP32"] / found["linears"],
        "sizes": found,
    }


def train(work: Comparison, variant: str, kind: str, flags: list[str]) -> None:
    """A run to its end; one that is complete is left as it is."""
    config = f"compare_ast_{work.name}{kind}.yaml"
    comparison.train(config, work.output, work.output / variant, flags, work.launch)


def markdown(rows: list[dict], work: Comparison) -> str:
    """The table with hardware, versions and date."""
    gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if gpu else f"CPU ({platform.machine()})"
    dense = next(row for row in rows if row["variant"] == "dense")
    lines = [
        f"# AST compared, scale {work.name}",
        "",
        f"{datetime.date.today()}, {device}, torch {torch.__version__}, "
        f"megasparse {megasparse.__version__}; {dense['parameters'] / 1e6:.1f}M parameters, "
        f"validation on {dense['tokens_of_evaluation']:,} held-out tokens.",
        "",
        f"    {work.command}",
        "",
        "| variant | steps of training | loss | perplexity | above dense |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        gap = row["perplexity"] / dense["perplexity"] - 1
        steps = row.get("steps", "") if row["variant"] not in METHODS else 0
        lines.append(
            f"| {row['variant']} | {steps} | {row['loss']:.4f} | {row['perplexity']:.3f} | "
            f"{100 * gap:+.1f} % |"
        )
    last = rows[-1]
    lines += [
        "",
        f"{INT4}: {last['times_smaller_than_fp32']:.2f} times smaller than the dense model in FP32 "
        f"with everything; the quantised linears alone "
        f"{last['linears_times_smaller_than_fp32']:.2f} times (values, places, scales and "
        "low-rank matrices).",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
