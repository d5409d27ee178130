"""What --deterministic-mode is worth and costs: runs of GPT-2 124M twice without it, twice with it.

Every time in a process of its own. The table says from which step on the two runs differ and how
far they part, and the tokens a second. The exit code is 1 when two runs with the flag differ in a
bit of a loss.

    python -m tools.bench.deterministic
    python -m tools.bench.deterministic --output tools/results/deterministic-h200-2026-01-01.md
    python -m tools.bench.deterministic --device cpu --tiny --steps 6      (does it run at all)
"""

from __future__ import annotations

import argparse
import datetime
import shlex
import statistics
import sys
from pathlib import Path

from megasparse.atomic_files import write_text
from megasparse.cli import markdown_table
from tools.bench.parts.short_runs import Result, launch

MODEL = [
    "--num-layers", "12", "--hidden-size", "768", "--num-attention-heads", "12",
    "--seq-length", "1024", "--vocab-size", "50257", "--micro-batch-size", "16",
    "--global-batch-size", "32", "--lr", "6e-4",
]  # fmt: skip
TINY = [
    "--num-layers", "2", "--hidden-size", "64", "--num-attention-heads", "4", "--seq-length", "32",
    "--vocab-size", "100", "--micro-batch-size", "2", "--global-batch-size", "4", "--lr", "6e-4",
]  # fmt: skip
FST = ["--sparsity-recipe", "fst", "--mask-update-interval", "1"]
FP8 = ["--fp8-format", "e4m3"]
RUNS = {
    "dense": ["--sparsity-recipe", "dense"],
    "fst": FST,
    "fst, fp8": [*FST, *FP8],
    "s_ste, fp8": ["--sparsity-recipe", "s_ste", *FP8],
}
# The choice among GEMMs and first launches take the time of a few steps.
WARMUP = 5


def parted(first: list[float], second: list[float]) -> str:
    """Since when two runs differ, and by how much of the loss at most."""
    differences = [abs(a - b) / abs(b) for a, b in zip(first, second, strict=True)]
    step = next((number for number, d in enumerate(differences, 1) if d), None)
    return "the same bits" if step is None else f"from step {step}, by {max(differences):.1e}"


def tokens_per_second(runs: tuple[Result, Result]) -> float:
    """Of the median step of both runs, after the warm-up."""
    seconds = [time for run in runs for time in run["seconds"][WARMUP:]]
    return runs[0]["tokens"] / statistics.median(seconds)


def report(results: dict[str, tuple[Result, Result]], args: argparse.Namespace) -> tuple[str, bool]:
    """The whole text in markdown, and whether the runs with the flag repeat."""
    any_run = next(iter(results.values()))[0]
    command = shlex.join(["python", "-m", "tools.bench.deterministic", *args.argv])
    lines = [
        "# Runs repeated, with and without --deterministic-mode",
        "",
        f"{datetime.date.today()}, {any_run['hardware']}, torch {any_run['torch']}, "
        f"{any_run['parameters'] / 1e6:.0f}M parameters, {any_run['tokens']:,} tokens a step, "
        f"{args.steps} steps, `{command}`",
        "",
    ]
    rows = []
    good = True
    for name in RUNS:
        if name not in results:
            continue
        plain, fixed = results[name], results[f"{name}, deterministic"]
        speeds = [tokens_per_second(plain), tokens_per_second(fixed)]
        cells = [parted(a["losses"], b["losses"]) for a, b in (plain, fixed)]
        good &= fixed[0]["losses"] == fixed[1]["losses"]
        cells += [f"{speed:,.0f}" for speed in speeds] + [f"{speeds[1] / speeds[0]:.2f}"]
        rows.append([name, *cells])
    columns = [
        "recipe",
        "two runs",
        "two runs, --deterministic-mode",
        "tokens/s",
        "with it",
        "ratio",
    ]
    lines += markdown_table(columns, rows, text_columns=3)
    return "\n".join(lines) + "\n", good


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a model of toy size")
    parser.add_argument("--steps", type=int, default=30, help=f"of a run, {WARMUP} are not timed")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=list(RUNS),
        default=list(RUNS),
        help="default: all; on CPUs without FP8",
    )
    parser.add_argument("--output", type=Path, help="markdown file to write")
    args = parser.parse_args(argv)
    args.argv = argv
    if args.device == "cpu":
        args.only = [name for name in args.only if "fp8" not in name]
    if args.steps <= WARMUP:
        parser.error(f"--steps {args.steps}: more than the {WARMUP} that are not timed")
    return args


def main(argv: list[str]) -> int:
    args = parse(argv)
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here; --device cpu --tiny shows that the tool runs")
    common = [
        *(TINY if args.tiny else MODEL),
        "--bf16",
        "--mock-data",
        "--eval-iters",
        "0",
        "--train-iters",
        "1000",
        "--dense-tail-fraction",
        "0",
    ]
    results: dict[str, tuple[Result, Result]] = {}
    for suffix, flag in (("", []), (", deterministic", ["--deterministic-mode"])):
        jobs = {
            f"{name}{suffix}": {"steps": args.steps, "flags": [*common, *RUNS[name], *flag]}
            for name in args.only
        }
        first, second = (launch(jobs, 1, args.device) for _ in range(2))
        results |= {name: (first[name], second[name]) for name in jobs}
    text, good = report(results, args)
    print(text)
    if args.output:
        write_text(args.output, text)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
