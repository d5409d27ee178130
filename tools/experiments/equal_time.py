"""Recipes compared in equal time: each trains as many steps as its speed allows in some minutes.

    python -m tools.experiments.equal_time --scale 30m --minutes 5 --output runs/equal_30m
    ... --scale 200m --minutes 10 --seeds 1 2 --output runs/equal_200m --jobs 2      # two GPUs
    ... --scale 200m --minutes 10 --output runs/equal_200m --sweep-lr 1.5e-4 3e-4 6e-4
    ... --scale 200m --minutes 10 --output runs/equal_200m --own-rates               # each its best

First it measures tokens/s of every variant alone on a GPU, with CUDA graphs (`tools.bench.train`),
into speeds.json. Dense models are taken at the speed of the fastest layers there are, Transformer
Engine's or ours; a schedule of phases at the speeds of its phases. Then each variant trains for
`minutes` times its speed: the schedule of the learning rate has that length, so that every run ends
at its lowest rate. Evaluation, logging and saving are left out of the minutes. Runs may share a GPU
(`--jobs 3 --share-gpus`), for their steps are counted out before; that saves no time, as processes
take turns on it.
`--sweep-lr` trains the first seed of --only with each rate for the same minutes.

All linears of the blocks are 2:4, in e4m3 where the name ends in _fp8. Writes equal_time.md, .json
and .png: final losses in nats and in percent to dense FP8, in pairs that share a seed, with
standard errors; losses after parts of the time; and the share of the time after which a run is
where dense FP8 ends. Restartable like compare_recipes.py; its settings and text are that one's.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megasparse.cli import guarded
from megasparse.config import load_config
from megasparse.errors import ConfigError, MegasparseError
from megasparse.metrics import plots
from tools.experiments import corpus_data, equal_tables, finished, recipe_sweep, run_queue
from tools.experiments.compare_recipes import TEXTS
from tools.experiments.equal_rates import SPEEDS, Speeds, needed, rate_of, read_speeds
from tools.experiments.recipe_runs import Work, train, write
from tools.experiments.recipe_tables import missing_line
from tools.experiments.recipe_variants import ALL_LINEARS, ALL_VARIANTS
from tools.experiments.run_queue import RunQueue, Task

EVALUATIONS = 12  # of a run; steps are a multiple
DEFAULT = ["dense", "dense_fp8", "fst_fp8", "fst_relaxed_fp8", "fst_tail_fp8", "s_ste_fp8"]
DEFAULT += ["s_ste_3_fp8"]


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


def lengths(work: Work, minutes: float, rates: dict[str, float]) -> dict[str, list[str]]:
    """Flags of each variant that make it as long as its speed allows."""
    config = load_config(work.task("dense", work.seeds[0]).arguments)
    batch = config.train.global_batch_size or config.train.micro_batch_size
    step_tokens = batch * config.model.seq_length
    found = {}
    for variant in work.variants:
        steps = steps_in(minutes, rate_of(variant, rates), step_tokens)
        more = ["--train-iters", str(steps), "--eval-interval", str(steps // EVALUATIONS)]
        found[variant] = [*more, "--log-interval", str(max(steps // 24, 1))]
    return found


def tasks_of(work: Work, minutes: float, rates: dict[str, float]) -> dict[Task, tuple[str, int]]:
    """The runs, with variant and seed."""
    more = lengths(work, minutes, rates)
    tasks = {}
    for seed in work.seeds:
        for variant in work.variants:
            own = "own-rates/" if variant in work.rates else ""
            folder = f"minutes-{minutes:g}/{own}{variant}-seed-{seed}"
            tasks[work.task(variant, seed, folder, more[variant])] = (variant, seed)
    return tasks


def measured_speeds(work: Work) -> Speeds:
    """Of all variants.

    Raises:
        ConfigError: some were not measured.
    """
    speeds = read_speeds(work.output)
    missing = [n for n in needed(work.variants) if speeds is None or n not in speeds.rates]
    if speeds is None or missing:
        raise ConfigError(f"{work.output}/{SPEEDS} lacks {', '.join(missing)}")
    return speeds


def compare(work: Work, minutes: float) -> str:
    """Train what is missing; the tables, also in equal_time.md (own_rates.md with rates of their
    own).

    Raises:
        ConfigError: speeds were not measured.
    """
    speeds = measured_speeds(work)
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
    lines += [f"Speeds: {speeds.hardware}.", *missing_line(missing)]
    write(work.output, work.table, rows, lines)
    if plots.available():
        plots.save_chart(
            equal_tables.chart(rows, work.variants, minutes), work.output / f"{work.table}.png"
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
    parser.add_argument(
        "--sweep-lr", type=float, nargs="+", default=[], metavar="LR", help="for --only"
    )
    parser.add_argument("--own-rates", action="store_true", help="of --sweep-lr, each its best")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time")
    parser.add_argument("--share-gpus", action="store_true", help="more --jobs than GPUs")
    parser.add_argument("--discard-checkpoints", action="store_true", help="of complete runs")
    parser.add_argument("--time-limit", type=float, metavar="MINUTES", help="for the whole command")
    args = parser.parse_args(own)

    def run() -> None:
        if unknown := [name for name in args.only if name not in ALL_VARIANTS]:
            raise ConfigError(f"--only {unknown[0]}, expected of {', '.join(ALL_VARIANTS)}")
        if (args.sweep_lr or args.own_rates) and "--lr" in flags:
            raise ConfigError("--sweep-lr and --own-rates choose the rate: not with -- --lr")
        if args.sweep_lr and args.own_rates:
            raise ConfigError("--sweep-lr trains with the rates given: not with --own-rates")
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
            discard=args.discard_checkpoints,
            table="own_rates" if args.own_rates else "equal_time",
        )
        if args.own_rates:
            work.rates = recipe_sweep.own_rates(work)
        work.output.mkdir(parents=True, exist_ok=True)
        speeds = read_speeds(work.output)
        if speeds is None or not set(needed(args.only)) <= speeds.rates.keys():
            corpus_data.make_data(work.output, work.text, work.corpus)
            # In a process of its own, which gives all its memory back.
            program = ("-m", "tools.experiments.equal_speeds")
            names = ["--scale", args.scale, "--output", str(args.output), *needed(args.only)]
            process = run_queue.start_process([*names, "--", *flags], {}, None, program=program)
            if process.wait():
                raise MegasparseError("speeds could not be measured, see above")
        if args.sweep_lr:
            more = lengths(work, args.minutes, measured_speeds(work).rates)
            print(recipe_sweep.sweep(work, args.sweep_lr, more))
        else:
            print(compare(work, args.minutes))

    return guarded("equal_time.py", run)


if __name__ == "__main__":
    sys.exit(main())
