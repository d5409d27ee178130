"""Measures the speeds of equal_time.py, each alone on the GPU, into speeds.json; those there stay.

python -m tools.experiments.equal_speeds --scale 30m --output runs/equal_30m dense fst_fp8
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from megasparse.atomic_files import write_json
from megasparse.cli import guarded
from megasparse.errors import ConfigError
from tools.bench.parts.short_runs import stand_alone
from tools.bench.train import measure
from tools.experiments import corpus_data, finished, run_queue
from tools.experiments.compare_recipes import TEXTS
from tools.experiments.equal_rates import MEASURED, SPEEDS, Speeds, read_speeds
from tools.experiments.recipe_variants import ALL_LINEARS


def main(argv: Sequence[str] | None = None) -> int:
    own, flags = run_queue.split_flags(list(sys.argv[1:] if argv is None else argv))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="+", choices=MEASURED, metavar="NAME")
    parser.add_argument("--scale", choices=TEXTS, required=True)
    parser.add_argument("--output", type=Path, required=True, help="folder with the data")
    parser.add_argument("--warmup", type=int, default=16, help="steps that do not count")
    parser.add_argument("--steps", type=int, default=16, help="steps that are timed")
    args = parser.parse_args(own)
    return guarded("equal_speeds.py", lambda: run(args, flags))


def run(args: argparse.Namespace, flags: Sequence[str]) -> None:
    """Measure what is missing; speeds.json is written after each.

    Raises:
        ConfigError: there is no GPU.
    """
    if not torch.cuda.is_available():
        raise ConfigError("equal_speeds.py: no GPU is here")
    stand_alone()
    speeds = read_speeds(args.output) or Speeds(finished.hardware(), {})
    for name in args.names:
        if name in speeds.rates:
            continue
        arguments = corpus_data.run_arguments(
            f"compare_recipes_{args.scale}.yaml",
            args.output,
            args.output / "speed",
            [*ALL_LINEARS, *flags, *MEASURED[name], "--eval-iters", "0"],
        )
        result, _ = measure(name, arguments, args.warmup, args.steps)
        speeds.rates[name] = result["tokens_per_second"]
        print(f"{name}: {speeds.rates[name]:,.0f} tokens/s", flush=True)
        write_json(args.output / SPEEDS, {"hardware": speeds.hardware, "rates": speeds.rates})


if __name__ == "__main__":
    sys.exit(main())
