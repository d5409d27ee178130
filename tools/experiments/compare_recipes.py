"""Sparsity recipes compared: one model, one text, one order of samples, one learning rate.

    python -m tools.experiments.compare_recipes --scale cpu --output runs/recipes_cpu  # minutes
    ... --scale gpu --output runs/recipes_gpu                           # one H200
    ... --scale gpu --output runs/recipes_gpu --jobs 2 --seeds 1 2      # two of them
    ... --scale gpu --output runs/recipes_gpu --jobs 4 --share-gpus     # two runs each
    ... --scale gpu --output runs/recipes_gpu --ablations
    ... --scale gpu --output runs/recipes_gpu --sweep-lr 4e-4 8e-4 1.6e-3

Trains

    dense, half                        the model; and with an FFN of half the width, which takes the
                                       operations of a 2:4 one (the papers' alternative)
    ste, sr_ste, fst, s_ste, s_ste_3   2:4 FFN, no dense tail; fst refreshes masks at every step
    fst_every_10, fst_every_40         --ablations: the mask interval
    fst_mvue_approximate, fst_no_mvue  how the output gradient is made 2:4, or not
    fst_no_decay, fst_tail             without masked decay; with the paper's dense tail of 1/6
    fst_relaxed, fst_relaxed_exact     row-wise masks in the last third
    fst_decay_2e-4, _6e-4, _6e-3       with another strength of it; sr_ste_decay_2e-4 likewise
    fst_rho, sr_ste_rho                lambda follows the second moments, rho 0.05
    fst_decay_before_clipping          gradient and decay clipped together
    fst_all_linears, s_ste_all_linears attention's linears too
    s_ste_scale_recomputed             S-STE's scale of the current weight, in every step
    sr_ste_double_pruned               a 2:4 grad_input for sr_ste, as s_ste_3 has it
    fst_fp8, s_ste_fp8, s_ste_3_fp8    --fp8: the sparse layers' GEMMs in e4m3

and writes results.json, results.md and, through plot_runs.py, pictures/. --sweep-lr trains `dense`
alone with each rate and writes sweep.json and sweep.md.

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
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from megasparse.atomic_files import write_json, write_text
from megasparse.cli import guarded
from megasparse.config import load_config
from megasparse.errors import ConfigError
from megasparse.metrics import plots
from tools import plot_runs
from tools.experiments import corpus_data, finished, recipe_tables, run_queue
from tools.experiments.recipe_variants import ABLATIONS, ALL_VARIANTS, BASES, IN_FP8, VARIANTS
from tools.experiments.run_queue import RunQueue, Task

TEXTS = {
    "cpu": corpus_data.Text(1024, 4_000_000, False, 1),
    "gpu": corpus_data.Text(32_000, 300_000_000, True, 12),
    "cluster": corpus_data.Text(32_000, 8_000_000_000, True, 32),
}


@dataclass
class Work:
    """One comparison.

    Attributes:
        output: where everything goes.
        config: name of a file in configs/experiments/.
        flags: of every run.
        queue: runs them.
        discard: remove the checkpoints of complete runs.
        command: for the table.
    """

    output: Path
    config: str
    text: corpus_data.Text
    variants: list[str]
    seeds: list[int]
    flags: list[str]
    queue: RunQueue
    corpus: list[Path] = field(default_factory=list)
    discard: bool = False
    command: str = "python -m tools.experiments.compare_recipes"

    def task(self, variant: str, seed: int, folder: str = "", more: Sequence[str] = ()) -> Task:
        """A run: the comparison's flags, the variant's, and some of its own."""
        run_dir = self.output / (folder or f"{variant}-seed-{seed}")
        flags = [*self.flags, *flags_of(self, variant), *more, "--seed", str(seed)]
        arguments = corpus_data.run_arguments(self.config, self.output, run_dir, flags)
        name = f"{' '.join([variant, *more])}, seed {seed}"
        return Task(variant, name, run_dir, tuple(arguments))


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
            print(sweep(work, args.sweep_lr))
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
        help="choose the rate of dense, with the first seed",
    )
    parser.add_argument("--discard-checkpoints", action="store_true", help="of complete runs")
    return parser.parse_args(own), flags


def work_of(args: argparse.Namespace, flags: list[str], argv: list[str], began: float) -> Work:
    """The comparison that the flags ask for.

    Raises:
        ConfigError: they cannot be met.
    """
    more = [*(IN_FP8 if args.fp8 else ()), *(ABLATIONS if args.ablations else ())]
    names = args.only or [*VARIANTS, *more]
    if unknown := [name for name in names if name not in ALL_VARIANTS]:
        raise ConfigError(f"--only {unknown[0]}, expected of {', '.join(ALL_VARIANTS)}")
    if args.sweep_lr and (args.only or more or "--lr" in flags):
        raise ConfigError(
            "--sweep-lr trains dense alone: not with --only, --ablations, --fp8 or -- --lr"
        )
    gpus = run_queue.visible_gpus()
    run_queue.check_jobs(args.jobs, args.launcher, gpus, args.share_gpus)
    queue = RunQueue(
        partial(run_queue.start_process, launcher=args.launcher),
        args.jobs,
        gpus,
        None if args.time_limit is None else began + 60 * args.time_limit,
    )
    return Work(
        output=args.output,
        config=f"compare_recipes_{args.scale}.yaml",
        text=TEXTS[args.scale],
        variants=["dense", *(name for name in names if name != "dense")],
        seeds=args.seeds,
        flags=flags,
        queue=queue,
        corpus=args.corpus,
        discard=args.discard_checkpoints,
        command=shlex.join(["python", "-m", "tools.experiments.compare_recipes", *argv]),
    )


def train(work: Work, tasks: dict[Task, tuple[str, int]]) -> list[Task]:
    """Run what is not finished; what the time limit left out of it.

    Args:
        tasks: with the variant and seed that their records name.
    """
    work.output.mkdir(parents=True, exist_ok=True)
    done = {task: finished.read(task.folder) for task in tasks}
    if None in done.values() and not work.queue.time_is_over():
        corpus_data.make_data(work.output, work.text, work.corpus)
    data = corpus_data.data_digest(work.output)
    for task, run in done.items():
        if run is not None:
            finished.check(run, task.folder, task.arguments, data)
            data = data or run.data
            like = run.alone != work.queue.shares() and run.hardware == finished.hardware()
            if run.seconds is not None and like:
                work.queue.seconds.setdefault(task.kind, []).append(run.seconds)

    def ended(task: Task, seconds: float | None) -> None:
        variant, seed = tasks[task]
        alone = not work.queue.shares()
        finished.record(task.folder, variant, seed, task.arguments, data, seconds, alone)
        if work.discard:
            shutil.rmtree(task.folder / "checkpoints", ignore_errors=True)

    return work.queue.run([task for task, run in done.items() if run is None], ended)


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
        *recipe_tables.table(rows, [name for name in work.variants if name in VARIANTS]),
        *recipe_tables.ablation_table(
            rows, {name: BASES[name] for name in work.variants if name in BASES}
        ),
        *recipe_tables.on_the_way(rows, work.variants),
        *recipe_tables.starts(rows),
        *recipe_tables.noise(rows),
        *recipe_tables.missing_line(missing),
    ]
    write(work.output, "results", rows, lines)
    draw(work, [task for task, key in tasks.items() if key in complete])
    return "\n".join(lines)


def sweep(work: Work, rates: Sequence[float]) -> str:
    """Train `dense` with each learning rate; the table, also in sweep.md, with the best's flags.

    `min_lr` is the same share of the rate as in the configuration.
    """
    train_config = load_config(work.task("dense", work.seeds[0]).arguments).train
    low, seed = train_config.min_lr / train_config.lr, work.seeds[0]
    own = {rate: ["--lr", f"{rate:g}", "--min-lr", f"{rate * low:g}"] for rate in rates}
    tasks = {
        rate: work.task("dense", seed, f"sweep/lr-{rate:g}-seed-{seed}", flags)
        for rate, flags in own.items()
    }
    missing = [task.name for task in train(work, dict.fromkeys(tasks.values(), ("dense", seed)))]
    runs = [(rate, run) for rate, task in tasks.items() if (run := finished.read(task.folder))]
    if not runs:
        return f"{work.output}: nothing is complete yet, missing {', '.join(missing)}"
    best = min(runs, key=lambda pair: pair[1].figures["valid_loss"])[0]
    edge = len(runs) > 1 and best in (min(rates), max(rates))
    lines = [
        *recipe_tables.heading("Learning rates of dense", [run for _, run in runs], work.command),
        *recipe_tables.sweep_table(runs),
        "",
        f"Lowest validation loss: `-- {' '.join(own[best])}`"
        f"{', at the end of what was tried: try further' if edge else ''}.",
        *recipe_tables.missing_line(missing),
    ]
    rows = [{"lr": rate, "seed": run.seed, **run.figures} for rate, run in runs]
    write(work.output, "sweep", rows, lines)
    return "\n".join(lines)


def write(output: Path, name: str, rows: list[dict], lines: list[str]) -> None:
    """NAME.json and NAME.md."""
    write_json(output / f"{name}.json", rows, indent=1)
    write_text(output / f"{name}.md", "\n".join(lines) + "\n")


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


def flags_of(work: Work, variant: str) -> list[str]:
    """What makes a variant, after the flags of all."""
    flags = ALL_VARIANTS[variant]
    if variant != "half":
        return flags
    model = load_config(["--config", str(corpus_data.config_path(work.config)), *work.flags])
    width = model.model.ffn_hidden_size or 4 * model.model.hidden_size
    return [*flags, "--ffn-hidden-size", str(width // 2)]


if __name__ == "__main__":
    sys.exit(main())
