"""Recipes compared in equal time: each trains as many steps as its speed allows in some minutes.

    python -m tools.experiments.equal_time --scale 30m --minutes 5 --output runs/equal_30m
    ... --scale 400m --minutes 10 --seeds 1 2 --output runs/equal_400m --jobs 2      # two GPUs
    ... --scale 30m --minutes 5 --output runs/equal_30m --jobs 3 --share-gpus        # side by side

First it measures tokens/s of every variant alone on a GPU, with CUDA graphs (`tools.bench.train`),
into speeds.json. Dense models are taken at the speed of the fastest layers there are, Transformer
Engine's or ours; a schedule of phases at the speeds of its phases. Then each variant trains for
`minutes` times its speed: the schedule of the learning rate has that length, so that every run ends
at its lowest rate. Runs may share a GPU meanwhile, for their steps are counted out before.
Evaluation, logging and saving are left out of the minutes.

All linears of the blocks are 2:4, in e4m3 where the name ends in _fp8. Writes equal_time.md, .json
and .png: final losses in nats and in percent to dense FP8, in pairs that share a seed, with
standard errors; losses after parts of the time; and the share of the time after which a run is
where dense FP8 ends. Restartable like compare_recipes.py; its settings and text are that one's.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megasparse.atomic_files import write_json
from megasparse.cli import guarded
from megasparse.config import load_config
from megasparse.errors import ConfigError, DataError
from megasparse.metrics import plots
from tools.experiments import corpus_data, equal_tables, finished, run_queue
from tools.experiments.compare_recipes import TEXTS
from tools.experiments.recipe_runs import Work, train, write
from tools.experiments.recipe_variants import ALL_LINEARS, ALL_VARIANTS, FP8
from tools.experiments.run_queue import RunQueue, Task

SPEEDS = "speeds.json"
EVALUATIONS = 12  # of a run; steps are a multiple
DEFAULT = ["dense", "dense_fp8", "fst_fp8", "fst_relaxed_fp8", "fst_tail_fp8", "s_ste_fp8"]
DEFAULT += ["s_ste_3_fp8"]
# What is measured for a variant: the fastest of these trains as many steps as it does.
FASTEST = {
    "dense": ("dense", "te bf16 fused"),
    "dense_fp8": ("dense_fp8", "te fp8 fused"),
}
# Phases, with their shares of the steps.
PARTS = {
    "fst_tail_fp8": {"fst_fp8": 5 / 6, "dense_fp8": 1 / 6},
    "fst_relaxed_fp8": {"fst_fp8": 2 / 3, "row": 1 / 3},
    "fst_tail": {"fst": 5 / 6, "dense": 1 / 6},
}
# Flags of what is measured and is no variant; a name of Transformer Engine's is taken by it.
MEASURED = {
    "row": [*ALL_VARIANTS["sr_ste_double_pruned"], *FP8],
    "te bf16 fused": ALL_VARIANTS["dense"],
    "te fp8 fused": ALL_VARIANTS["dense"],
}


@dataclass(frozen=True)
class Speeds:
    """tokens/s by name, and where they were measured."""

    hardware: str
    rates: dict[str, float]


def rate_of(variant: str, rates: dict[str, float]) -> float:
    """tokens/s of a variant, of what was measured (see FASTEST and PARTS)."""
    if variant in FASTEST:
        return max(rates[name] for name in FASTEST[variant])
    parts = PARTS.get(variant, {variant: 1.0})
    return 1 / sum(share / rates[name] for name, share in parts.items())


def needed(variants: Sequence[str]) -> list[str]:
    """What is to be measured."""
    names: dict[str, None] = {}
    for variant in variants:
        for name in FASTEST.get(variant, PARTS.get(variant, (variant,))):
            names[name] = None
    return list(names)


def steps_in(minutes: float, rate: float, step_tokens: int) -> int:
    """Steps that end within some minutes, a multiple of EVALUATIONS.

    Raises:
        ConfigError: there are none.
    """
    steps = int(minutes * 60 * rate / step_tokens) // EVALUATIONS * EVALUATIONS
    if steps == 0:
        raise ConfigError(
            f"--minutes {minutes:g} is less than {EVALUATIONS} steps at {rate:,.0f} tokens/s"
        )
    return steps


def measure(work: Work, variants: Sequence[str], warmup: int, steps: int) -> None:
    """Measure what speeds.json lacks, in this process, which is a rank of its own from then on.

    Raises:
        ConfigError: there is no GPU.
    """
    if not torch.cuda.is_available():
        raise ConfigError("--measure: no GPU is here")
    from tools.bench.parts.short_runs import stand_alone
    from tools.bench.train import measure as measure_steps

    stand_alone()
    speeds = read_speeds(work.output) or Speeds(finished.hardware(), {})
    for name in needed(variants):
        if name in speeds.rates:
            continue
        own = [*ALL_LINEARS, *MEASURED.get(name, ALL_VARIANTS.get(name, []))]
        arguments = corpus_data.run_arguments(
            work.config, work.output, work.output / "speed", [*work.flags, *own, "--eval-iters=0"]
        )
        result, _ = measure_steps(name, arguments, warmup, steps)
        speeds.rates[name] = result["tokens_per_second"]
        print(f"{name}: {speeds.rates[name]:,.0f} tokens/s", flush=True)
        write_json(work.output / SPEEDS, {"hardware": speeds.hardware, "rates": speeds.rates})


def read_speeds(output: Path) -> Speeds | None:
    """What was measured; None: nothing.

    Raises:
        DataError: the file is none of these.
    """
    path = output / SPEEDS
    if not path.exists():
        return None
    try:
        return Speeds(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: not what equal_time.py writes: {error}") from None


def tasks_of(work: Work, minutes: float, rates: dict[str, float]) -> dict[Task, tuple[str, int]]:
    """The runs, with variant and seed."""
    config = load_config(work.task("dense", work.seeds[0]).arguments)
    batch = config.train.global_batch_size or config.train.micro_batch_size
    step_tokens = batch * config.model.seq_length
    tasks = {}
    for seed in work.seeds:
        for variant in work.variants:
            steps = steps_in(minutes, rate_of(variant, rates), step_tokens)
            more = ["--train-iters", str(steps), "--eval-interval", str(steps // EVALUATIONS)]
            more += ["--log-interval", str(max(steps // 24, 1))]
            folder = f"minutes-{minutes:g}/{variant}-seed-{seed}"
            tasks[work.task(variant, seed, folder, more)] = (variant, seed)
    return tasks


def compare(work: Work, minutes: float) -> str:
    """Train what is missing; the tables, also in equal_time.md.

    Raises:
        ConfigError: speeds were not measured.
    """
    speeds = read_speeds(work.output)
    missing_rates = [n for n in needed(work.variants) if speeds is None or n not in speeds.rates]
    if speeds is None or missing_rates:
        raise ConfigError(f"{work.output}/{SPEEDS} lacks {', '.join(missing_rates)}: --measure")
    tasks = tasks_of(work, minutes, speeds.rates)
    missing = [task.name for task in train(work, tasks)]
    runs = {key: finished.read(task.folder) for task, key in tasks.items()}
    complete = {key: run for key, run in runs.items() if run is not None}
    if not complete:
        return f"{work.output}: nothing is complete yet, missing {', '.join(missing)}"
    rows: list[dict[str, Any]] = [
        equal_tables.row_of(
            run, minutes, rate_of(variant, speeds.rates), complete.get(("dense_fp8", seed))
        )
        for (variant, seed), run in complete.items()
    ]
    lines = equal_tables.report(rows, work.variants, speeds.rates, minutes, work.command)
    lines += [f"Speeds: {speeds.hardware}.", *equal_tables.missing_line(missing)]
    write(work.output, "equal_time", rows, lines)
    if plots.available():
        plots.save_chart(
            equal_tables.chart(rows, work.variants, minutes), work.output / "equal_time.png"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    began = time.monotonic()
    argv = list(sys.argv[1:] if argv is None else argv)
    own, flags = run_queue.split_flags(argv)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    scales = [name for name, text in TEXTS.items() if text.whole_machine]
    parser.add_argument("--scale", choices=scales, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, required=True, help="of each run, alone on a GPU")
    parser.add_argument("--corpus", type=Path, nargs="+", default=[], help="JSONL; default: made")
    parser.add_argument("--only", nargs="+", default=DEFAULT, metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time")
    parser.add_argument("--share-gpus", action="store_true", help="more --jobs than GPUs")
    parser.add_argument("--time-limit", type=float, metavar="MINUTES", help="for the whole command")
    parser.add_argument("--measure", action="store_true", help="speeds alone, and stop")
    parser.add_argument("--warmup", type=int, default=16, help="steps that do not count")
    parser.add_argument("--steps", type=int, default=16, help="steps that are timed")
    args = parser.parse_args(own)

    def run() -> None:
        if unknown := [name for name in args.only if name not in ALL_VARIANTS]:
            raise ConfigError(f"--only {unknown[0]}, expected of {', '.join(ALL_VARIANTS)}")
        gpus = run_queue.visible_gpus()
        run_queue.check_jobs(args.jobs, "", gpus, args.share_gpus)
        limit = None if args.time_limit is None else began + 60 * args.time_limit
        work = Work(
            output=args.output,
            config=f"compare_recipes_{args.scale}.yaml",
            text=TEXTS[args.scale],
            variants=args.only,
            seeds=args.seeds,
            flags=[*ALL_LINEARS, *flags],
            queue=RunQueue(run_queue.start_process, args.jobs, gpus, limit),
            corpus=args.corpus,
            command=shlex.join(["python", "-m", "tools.experiments.equal_time", *argv]),
        )
        work.output.mkdir(parents=True, exist_ok=True)
        speeds = read_speeds(work.output)
        if speeds is None or not set(needed(args.only)) <= speeds.rates.keys():
            corpus_data.make_data(work.output, work.text, work.corpus)
            if args.measure:
                measure(work, args.only, args.warmup, args.steps)
            else:  # in a process that gives all its memory back
                program = ("-m", "tools.experiments.equal_time")
                start = partial(run_queue.start_process, program=program)
                if start([*own, "--measure", "--", *flags], {}, None).wait():
                    raise ConfigError("speeds could not be measured, see above")
        if not args.measure:
            print(compare(work, args.minutes))

    return guarded("equal_time.py", run)


if __name__ == "__main__":
    sys.exit(main())
