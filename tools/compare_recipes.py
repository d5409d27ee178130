"""Sparsity recipes compared: one model, one text, one order of samples, one learning rate.

    python tools/compare_recipes.py --scale cpu --output runs/recipes_cpu     # CPU, minutes
    python tools/compare_recipes.py --scale gpu --output runs/recipes_gpu     # one H200
    python tools/compare_recipes.py --scale gpu --output ... --only fst s_ste --seeds 1 2
    python tools/compare_recipes.py --scale gpu --output ... --ablations

Trains

    dense, half                        the model; and with an FFN of half the width, which takes the
                                       operations of a 2:4 one (the papers' alternative)
    ste, sr_ste, fst, s_ste            2:4 FFN, no dense tail; fst refreshes masks at every step
    fst_every_10, fst_every_40         --ablations: the mask interval
    fst_mvue_approximate, fst_no_mvue  how the output gradient is made 2:4, or not
    fst_no_decay, fst_tail             without masked decay; with the paper's dense tail of 1/6
    fst_all_linears, s_ste_all_linears attention's linears too

and writes results.json, results.md and, through plot_runs.py, pictures/. Restartable: what is
finished is not repeated, an interrupted run goes on. Settings: configs/compare_recipes_SCALE.yaml;
flags after `--` go to every run (`-- --lr 6e-4`). Several ranks: --launcher "deepspeed --num_gpus
8", with a hostfile for several nodes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import comparison
import plot_runs
import plots
import torch

import megasparse
from megasparse.config import load_config
from megasparse.errors import ConfigError, MegasparseError

TEXTS = {
    "cpu": comparison.Text(1024, 4_000_000, False, 1),
    "gpu": comparison.Text(32_000, 1_000_000_000, True, 12),
    "cluster": comparison.Text(32_000, 8_000_000_000, True, 32),
}
FST = ["--sparsity-recipe", "fst", "--dense-tail-fraction", "0"]
EVERY_STEP = ["--mask-update-interval", "1"]
S_STE = ["--sparsity-recipe", "s_ste", "--masked-decay", "none"]
ALL_LINEARS = ["--sparse-layers", "*.mlp.*", "*.self_attention.linear_*"]
PLAIN = ["--masked-decay", "none", "--mask-update-interval", "none"]
VARIANTS = {
    "dense": ["--sparsity-recipe", "dense", *PLAIN],
    "half": ["--sparsity-recipe", "dense", *PLAIN],  # and half of the FFN
    "ste": ["--sparsity-recipe", "ste", *PLAIN],
    "sr_ste": ["--sparsity-recipe", "sr_ste", "--mask-update-interval", "none"],
    "fst": [*FST, *EVERY_STEP],
    "s_ste": [*S_STE, "--mask-update-interval", "none"],
}
ABLATIONS = {
    "fst_every_10": [*FST, "--mask-update-interval", "10"],
    "fst_every_40": [*FST, "--mask-update-interval", "40"],
    "fst_mvue_approximate": [*FST, *EVERY_STEP, "--mvue", "approximate"],
    "fst_no_mvue": [*FST, *EVERY_STEP, "--mvue", "off"],
    "fst_no_decay": [*FST, *EVERY_STEP, "--masked-decay", "0"],
    "fst_tail": ["--sparsity-recipe", "fst", *EVERY_STEP],
    "fst_all_linears": [*FST, *EVERY_STEP, *ALL_LINEARS],
    "s_ste_all_linears": [*S_STE, "--mask-update-interval", "none", *ALL_LINEARS],
}


@dataclass
class Work:
    """One comparison.

    Attributes:
        output: where everything goes.
        config: name of a file in configs/.
        flags: of every run.
        launch: runs launch/pretrain.py with flags; raises if it fails.
        command: for the table.
    """

    output: Path
    config: str
    text: comparison.Text
    variants: list[str]
    seeds: list[int]
    flags: list[str]
    launch: Callable[[list[str]], None]
    corpus: list[Path]
    command: str = "python tools/compare_recipes.py"

    def folder(self, variant: str, seed: int) -> Path:
        return self.output / f"{variant}-seed-{seed}"


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    args, flags = parse(argv)
    try:
        names = args.only or [*VARIANTS, *(ABLATIONS if args.ablations else ())]
        if unknown := [name for name in names if name not in VARIANTS | ABLATIONS]:
            raise ConfigError(f"--only {unknown[0]}, expected of {', '.join(VARIANTS | ABLATIONS)}")
        variants = ["dense", *(name for name in names if name != "dense")]
        work = Work(
            args.output, f"compare_recipes_{args.scale}.yaml", TEXTS[args.scale], variants,
            args.seeds, flags, partial(comparison.subprocess_launch, launcher=args.launcher),
            args.corpus,
            " ".join(["python tools/compare_recipes.py", *argv]),
        )  # fmt: skip
        print(compare(work))
    except MegasparseError as error:
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    return 0


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    own, flags = argv, []
    if "--" in argv:
        own, flags = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", choices=TEXTS, default="cpu")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--corpus", type=Path, nargs="+", default=[], help="JSONL; default: made")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="and dense")
    parser.add_argument("--launcher", default="", metavar="COMMAND", help="starts the ranks")
    parser.add_argument("--ablations", action="store_true", help="the variants of fst too")
    return parser.parse_args(own), flags


def compare(work: Work) -> str:
    """Train what is missing; the table, which is also in results.md."""
    work.output.mkdir(parents=True, exist_ok=True)
    comparison.make_data(work.output, work.text, work.corpus)
    for seed in work.seeds:
        for variant in work.variants:
            print(f"{variant}, seed {seed} ...", flush=True)
            flags = [*work.flags, *flags_of(work, variant), "--seed", str(seed)]
            folder = work.folder(variant, seed)
            comparison.train(work.config, work.output, folder, flags, work.launch)
    rows = [row_of(work, variant, seed) for seed in work.seeds for variant in work.variants]
    (work.output / "results.json").write_text(json.dumps(rows, indent=1) + "\n")
    table = markdown(rows, work)
    (work.output / "results.md").write_text(table)
    if plots.available():
        folders = [str(work.folder(variant, work.seeds[0])) for variant in work.variants]
        pictures = ["--output", str(work.output / "pictures"), "--label", *work.variants]
        plot_runs.main([*folders, *pictures])
    return table


def flags_of(work: Work, variant: str) -> list[str]:
    """What makes a variant, after the flags of all."""
    flags = (VARIANTS | ABLATIONS)[variant]
    if variant != "half":
        return flags
    model = load_config(["--config", str(comparison.ROOT / "configs" / work.config), *work.flags])
    width = model.model.ffn_hidden_size or 4 * model.model.hidden_size
    return [*flags, "--ffn-hidden-size", str(width // 2)]


def row_of(work: Work, variant: str, seed: int) -> dict:
    """The figures of one run, and beside the dense run of the same seed.

    `dense_share` is the share of the dense run's steps after which it had the variant's final
    validation loss (linear between evaluations; 1: not before its end), `hours_to` the time until
    the variant's loss was at most 1.02 times the dense run's last.
    """
    run = plot_runs.read_run(work.folder(variant, seed), variant)
    dense = plot_runs.read_run(work.folder("dense", seed), "dense")
    curve = [(r["step"], r["valid_loss"], r["hours"]) for r in run.rows if r.get("valid_loss")]
    of_dense = [(r["step"], r["valid_loss"]) for r in dense.rows if r.get("valid_loss")]
    losses = [r["loss"] for r in run.rows if r["loss"] is not None]
    flips = [r["flip_rate"] for r in run.rows if r.get("flip_rate") is not None]
    tail = losses[-max(len(losses) // 20, 1) :]
    final, target = curve[-1][1], 1.02 * of_dense[-1][1]
    speeds = [r["tokens_per_second"] for r in run.rows[len(run.rows) // 10 :]]
    return {
        "variant": variant,
        "seed": seed,
        "steps": run.rows[-1]["step"],
        "tokens": run.rows[-1]["tokens"],
        "training_loss": statistics.fmean(tail),
        "valid_loss": final,
        "gap": final / of_dense[-1][1] - 1,
        "dense_share": share_of(of_dense, final),
        "flip_rate_highest": max(flips, default=None),
        "flip_rate_last": flips[-1] if flips else None,
        "tokens_per_second": statistics.median(speeds),
        "hours": run.rows[-1]["hours"],
        "hours_to": next((hours for _, loss, hours in curve if loss <= target), None),
    }


def share_of(curve: Sequence[tuple[int, float]], loss: float) -> float:
    """The share of a run's steps after which its validation loss was `loss`."""
    last = curve[-1][0]
    for (before, high), (step, low) in zip(curve, curve[1:], strict=False):
        if low <= loss < high:
            return (before + (step - before) * (high - loss) / (high - low)) / last
    return curve[0][0] / last if loss >= curve[0][1] else 1.0


def markdown(rows: list[dict], work: Work) -> str:
    """The table with hardware, versions and date; several seeds as mean and range."""
    gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if gpu else f"CPU ({platform.machine()})"
    lines = [
        "# Recipes compared",
        "",
        f"{datetime.date.today()}, {device}, torch {torch.__version__}, megasparse "
        f"{megasparse.__version__}; {rows[0]['tokens']:,} tokens a run, seeds "
        f"{', '.join(map(str, work.seeds))}.",
        "",
        f"    {work.command}",
        "",
        "| variant | training loss | validation loss | to dense | dense steps to it | flip rate, "
        "highest and last | tokens/s | minutes | minutes to 1.02 x dense |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for variant in work.variants:
        group = [row for row in rows if row["variant"] == variant]
        mean = {
            key: statistics.fmean(row[key] for row in group)
            if all(row[key] is not None for row in group)
            else None
            for key in group[0]
            if key != "variant"
        }
        gaps = [100 * row["gap"] for row in group]
        spread = f" ({min(gaps):+.2f} to {max(gaps):+.2f})" if len(group) > 1 else ""
        flips = (
            "-"
            if mean["flip_rate_last"] is None
            else f"{mean['flip_rate_highest']:.4f}, {mean['flip_rate_last']:.4f}"
        )
        reached = "-" if mean["hours_to"] is None else f"{60 * mean['hours_to']:.1f}"
        lines.append(
            f"| {variant} | {mean['training_loss']:.4f} | {mean['valid_loss']:.4f} | "
            f"{100 * mean['gap']:+.2f} %{spread} | {100 * mean['dense_share']:.0f} % | {flips} | "
            f"{mean['tokens_per_second']:,.0f} | {60 * mean['hours']:.1f} | {reached} |"
        )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
