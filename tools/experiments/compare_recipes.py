"""Sparsity recipes compared: one model, one text, one order of samples, one learning rate.

    python -m tools.experiments.compare_recipes --scale cpu --output runs/recipes_cpu  # minutes
    ... --scale 10m --output runs/recipes_10m --jobs 3 --share-gpus --seeds 1 2 3  # one H200
    ... --scale 10m --output runs/recipes_10m --jobs 2 --seeds 1 2      # two of them
    ... --scale 10m --output runs/recipes_10m --ablations
    ... --scale 10m --output runs/recipes_10m --only fst s_ste --sweep-lr 2e-3 3e-3 4.5e-3
    ... --scale 10m --output runs/recipes_10m --own-rates

Trains

    dense, half                        the model; and with an FFN of half the width, which takes the
                                       operations of a 2:4 one (the papers' alternative)
    ste, sr_ste, fst, s_ste, s_ste_3   2:4 FFN, no dense tail; fst refreshes masks at every step
    fst_tail, fst_relaxed              fst, but the last 1/6 dense, as its paper has it; but the
                                       last 1/3 with row-wise masks
    dense_again                        --ablations: the same as dense, for what a repetition differs
    fst_every_10, fst_every_40         the mask interval
    fst_mvue_approximate, fst_no_mvue  how the output gradient is made 2:4, or not
    fst_no_decay                       without masked decay
    fst_relaxed_exact                  row-wise masks in the last third, without MVUE there
    fst_decay_2e-4, _6e-4, _6e-3       with another strength of it; sr_ste_decay_2e-4 likewise
    fst_rho, sr_ste_rho                lambda follows the second moments, rho 0.05
    fst_decay_before_clipping          gradient and decay clipped together
    fst_all_linears, s_ste_all_linears attention's linears too; s_ste_3_all_linears likewise
    s_ste_scale_recomputed             S-STE's scale of the current weight, in every step
    sr_ste_double_pruned               a 2:4 grad_input for sr_ste, as s_ste_3 has it
    dense_fp8, fst_fp8, s_ste_fp8, ... --fp8: the layers' GEMMs in e4m3

and writes results.json, results.md and, through plot_runs.py, pictures/. Gaps are means over pairs
of runs that share a seed, with standard errors.

Scales: `cpu`; `gpu` and `cluster`, GPT-2 124M on Python sources; `10m`, `30m`, `124m`, named after
the parameters, on the text that lies on the machine (machine_texts.py), of which no run sees
anything twice: more steps than there is text are refused. A tail goes on from a checkpoint of fst
where both are trained here.

--sweep-lr trains the variants of --only (default: dense) with each rate and the first seed, and
writes sweep.json and sweep.md. --own-rates then gives each variant its best rate of sweep.json, and
writes own_rates.md; runs whose best rate is the shared one are not repeated.

Restartable, also on another machine: what is finished is not repeated, which the finished.json of a
run says (with config.yaml and metrics.jsonl it is all that the table and the pictures need; take
tokenizer.model and data_text_document.* along as well, or have them made of the same text). An
interrupted run goes on from its checkpoint. --time-limit begins nothing that would not end in time
and says what is missing; with 0 the table is made of what is there. With --jobs each run has a GPU
and a log beside its folder; with --share-gpus there may be more of them than GPUs, which small
models do not fill, and the table says nothing of the speed of such runs.

Settings: configs/experiments/compare_recipes_SCALE.yaml; flags after `--` go to every run
(`-- --lr 6e-4`). Several ranks: --launcher "deepspeed --num_gpus 8", with a hostfile for several
nodes.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from megasparse.cli import guarded
from megasparse.errors import ConfigError
from megasparse.metrics import plots
from tools import plot_runs
from tools.experiments import (
    corpus_data,
    finished,
    recipe_sweep,
    recipe_tables,
    run_queue,
)
from tools.experiments.recipe_runs import Work, train, write
from tools.experiments.recipe_variants import ABLATIONS, ALL_VARIANTS, BASES, IN_FP8, VARIANTS
from tools.experiments.run_queue import RunQueue, Task

TEXTS = {
    "cpu": corpus_data.Text(1024, 4_000_000, False, 1),
    "gpu": corpus_data.Text(32_000, 300_000_000, True, 12),
    "cluster": corpus_data.Text(32_000, 8_000_000_000, True, 32),
    # Bytes: a little more than the tokens of a run take.
    "10m": corpus_data.Text(4096, 650_000_000, True, 16, whole_machine=True),
    "30m": corpus_data.Text(4096, 4_000_000_000, True, 16, whole_machine=True),
    "124m": corpus_data.Text(4096, 4_000_000_000, True, 16, whole_machine=True),
    "200m": corpus_data.Text(4096, 1_000_000_000, True, 16, whole_machine=True),
}


def main(argv: Sequence[str] | None = None) -> int:
    began = time.monotonic()
    argv = list(sys.argv[1:] if argv is None else argv)
    args, flags = parse(argv)

    def run() -> None:
        work = work_of(args, flags, argv, began)
        if args.data_only:
            work.output.mkdir(parents=True, exist_ok=True)
            corpus_data.make_data(work.output, work.text, work.corpus)
            print(f"{work.output}: data of sha256 {corpus_data.data_digest(work.output)}")
        elif args.sweep_lr:
            print(recipe_sweep.sweep(work, args.sweep_lr))
        else:
            print(compare(work))

    return guarded("compare_recipes.py", run)


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    own, flags = run_queue.split_flags(argv)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", choices=TEXTS, default="cpu")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--corpus", type=Path, nargs="+", default=[], help="JSONL; default: made")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="and dense")
    parser.add_argument("--launcher", default="", metavar="COMMAND", help="starts the ranks")
    parser.add_argument("--ablations", action="store_true", help="their variants too")
    parser.add_argument("--fp8", action="store_true", help="its variants too")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time")
    parser.add_argument("--share-gpus", action="store_true", help="more --jobs than GPUs")
    parser.add_argument("--time-limit", type=float, metavar="MINUTES", help="for the whole command")
    parser.add_argument("--data-only", action="store_true", help="make the data and stop")
    parser.add_argument(
        "--sweep-lr",
        type=float,
        nargs="+",
        default=[],
        metavar="LR",
        help="choose the rate of dense, or of --only, with the first seed",
    )
    parser.add_argument("--own-rates", action="store_true", help="of --sweep-lr, each its best")
    parser.add_argument("--discard-checkpoints", action="store_true", help="of complete runs")
    return parser.parse_args(own), flags


def work_of(args: argparse.Namespace, flags: list[str], argv: list[str], began: float) -> Work:
    """The comparison that the flags ask for.

    Raises:
        ConfigError: they cannot be met.
    """
    more = [*(IN_FP8 if args.fp8 else ()), *(ABLATIONS if args.ablations else ())]
    names = args.only or (["dense"] if args.sweep_lr else [*VARIANTS, *more])
    if unknown := [name for name in names if name not in ALL_VARIANTS]:
        raise ConfigError(f"--only {unknown[0]}, expected of {', '.join(ALL_VARIANTS)}")
    if (args.sweep_lr or args.own_rates) and "--lr" in flags:
        raise ConfigError("--sweep-lr and --own-rates choose the rate: not with -- --lr")
    if args.sweep_lr and (more or args.own_rates):
        raise ConfigError(
            "--sweep-lr trains dense or --only: not with --ablations, --fp8, --own-rates"
        )
    gpus = run_queue.visible_gpus()
    run_queue.check_jobs(args.jobs, args.launcher, gpus, args.share_gpus)
    queue = RunQueue(
        partial(run_queue.start_process, launcher=args.launcher),
        args.jobs,
        gpus,
        None if args.time_limit is None else began + 60 * args.time_limit,
    )
    work = Work(
        output=args.output,
        config=f"compare_recipes_{args.scale}.yaml",
        text=TEXTS[args.scale],
        variants=names if args.sweep_lr else list(dict.fromkeys(["dense", *names])),
        seeds=args.seeds,
        flags=flags,
        queue=queue,
        corpus=args.corpus,
        discard=args.discard_checkpoints,
        command=shlex.join(["python", "-m", "tools.experiments.compare_recipes", *argv]),
    )
    if args.own_rates:
        work.rates, work.table = recipe_sweep.own_rates(work), "own_rates"
    return work


def compare(work: Work) -> str:
    """Train what is missing; the table, which is also in results.md."""
    tasks = {
        work.task(variant, seed): (variant, seed)
        for seed in work.seeds
        for variant in work.variants
    }
    missing = [task.name for task in train(work, tasks)]
    runs = {key: finished.read(task.folder) for task, key in tasks.items()}
    complete = {key: run for key, run in runs.items() if run is not None}
    if not complete:
        return f"{work.output}: nothing is complete yet, missing {', '.join(missing)}"
    rows = [
        recipe_tables.row_of(
            run,
            complete.get(("dense", seed)),
            complete.get((BASES[variant], seed)) if variant in BASES else None,
        )
        for (variant, seed), run in complete.items()
    ]
    lines = [
        *recipe_tables.heading("Recipes compared", list(complete.values()), work.command),
        *recipe_tables.table(rows, [name for name in work.variants if name not in ABLATIONS]),
        *recipe_tables.ablation_table(
            rows, {name: BASES[name] for name in work.variants if name in BASES}
        ),
        *recipe_tables.on_the_way(rows, work.variants),
        *recipe_tables.starts(rows),
        *recipe_tables.noise(rows),
        *recipe_tables.missing_line(missing),
    ]
    write(work.output, work.table, rows, lines)
    draw(work, [task for task, key in tasks.items() if key in complete])
    return "\n".join(lines)


def draw(work: Work, tasks: Sequence[Task]) -> None:
    """Pictures of the first seed's runs, where they have their metrics."""
    shown = {
        task.kind: str(task.folder)
        for task in reversed(tasks)
        if (task.folder / "metrics.jsonl").exists()
    }
    labels = [variant for variant in work.variants if variant in shown]
    if plots.available() and labels:
        folders = [shown[label] for label in labels]
        plot_runs.main([*folders, "--output", str(work.output / "pictures"), "--label", *labels])


if __name__ == "__main__":
    sys.exit(main())
