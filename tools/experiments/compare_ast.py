"""AST's comparison: one dense model, and every way of making it 2:4, on the same held-out text.

    python -m tools.experiments.compare_ast --scale tiny --output runs/compare_ast_tiny  # minutes
    ... --scale gpu --output runs/compare_ast_gpu                           # one H200
    ... --scale gpu --output runs/compare_ast_gpu --jobs 2 --time-limit 9   # two of them
    ... --scale gpu --output runs/compare_ast_gpu --jobs 2 --plan           # how long it takes
    ... --scale 10m --output runs/compare_ast_10m      # 10.6M parameters, fresh text

Makes a corpus (or takes --corpus), a tokenizer and a dataset, pre-trains a dense GPT on it, and
compares on the validation split:

    dense              | the model itself
    dense_longer       | retrained densely: what the additional training alone is worth
    magnitude          | pruned once, no training
    wanda              | the same, by |w| times the norm of its input
    sparsegpt          | the same, later columns make up for pruned ones
    sr_ste             | retrained by SR-STE, cross entropy alone
    cast               | retrained by CAST: L1 decay in Adam's metric, scales, distillation
    ast                | retrained by AST: annealed decay, distillation from the dense model
    ast_slorb          | with SLoRB's low-rank branch
    ast_slorb_int4     | and quantized to 4 bits
    ..._double_pruned  | ast and ast_slorb with a 2:4 grad_input; CAST trains with dense GEMMs

Writes results.json, results.md, results.png and pictures/ into --output. With --jobs N the dense
model is trained on N devices (data parallel); then every variant is made and measured by a process
of its own, N at a time, each with a GPU and a log in --output (--share-gpus: several with one).

Restartable: a variant that has its VARIANT.json is not made again, an interrupted training goes on
from its last checkpoint. --time-limit ends what is under way at the limit (it saves, which takes
some seconds), makes the table of what is there and names what is missing; with 0 it makes the table
alone. The settings of the two kinds of training are configs/experiments/compare_ast_SCALE.yaml
and compare_ast_SCALE_retrain.yaml; flags after `--` go to every run, those of --retrain-flags
(one word: --retrain-flags="--lr 1e-4") to the retraining.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from megasparse.atomic_files import write_json, write_text
from megasparse.checkpoint.directory import list_steps
from megasparse.cli import guarded
from megasparse.config import load_config, resolve
from megasparse.errors import CheckpointError, MegasparseError
from megasparse.metrics import plots
from tools import plot_runs
from tools.experiments import ast_plan, ast_tables, ast_variants, corpus_data, finished, run_queue
from tools.experiments.ast_variants import INT4, ORDER, RETRAINED, SCALES, VARIANTS, Work
from tools.experiments.run_queue import RunQueue, Start, Task

COMMANDS = "commands.json"


@dataclass
class Session:
    """One call of this tool.

    Attributes:
        start_dense: begins the dense training, on `jobs` devices.
        start_make: begins a process that makes a variant, from `make_arguments` and its name.
        deadline: time.monotonic() by which this call is to end; None: no limit.
        discard: remove checkpoints that nothing missing needs.
        say: tells what begins and ends.
    """

    work: Work
    variants: list[str]
    start_dense: Start
    start_make: Start
    jobs: int = 1
    gpus: Sequence[str] = ()
    deadline: float | None = None
    discard: bool = False
    command: str = "python -m tools.experiments.compare_ast"
    make_arguments: list[str] = field(default_factory=list)
    say: Callable[[str], None] = lambda line: print(line, flush=True)

    def queue(self, start: Start, jobs: int) -> RunQueue:
        """A queue of `jobs` runs at a time that ends at the deadline."""
        return RunQueue(start, jobs, self.gpus, self.deadline, stops=True, say=self.say)

    def time_is_over(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline


def main(argv: Sequence[str] | None = None) -> int:
    began = time.monotonic()
    argv = list(sys.argv[1:] if argv is None else argv)
    args, flags = parse(argv)
    dense, retrain = (
        ["--train-iters", str(steps)] if steps else []
        for steps in (args.dense_iters, args.retrain_iters)
    )
    retrain += shlex.split(args.retrain_flags)
    scale = SCALES[args.scale]
    work = Work(args.output, args.scale, scale, flags, dense, retrain, corpus=args.corpus)

    def run() -> None:
        if args.make:  # SIGTERM, as an exception, ends the run under way, which saves
            ast_variants.make(work, args.make)
        elif args.plan:
            rate = args.tokens_per_second or work.scale.tokens_per_second
            print(ast_plan.text(ast_plan.stages(work, args.jobs, rate), args.jobs, rate))
        elif args.data_only:
            work.output.mkdir(parents=True, exist_ok=True)
            corpus_data.make_data(work.output, work.scale.text, work.corpus)
            print(f"{work.output}: data of sha256 {corpus_data.data_digest(work.output)}")
        else:
            print(compare(session_of(args, work, argv, began)))

    return guarded("compare_ast.py", run)


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    own, flags = run_queue.split_flags(argv)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", choices=SCALES, default="tiny")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--corpus", type=Path, nargs="+", default=[], help="JSONL; default: made")
    parser.add_argument("--dense-iters", type=int, help="steps instead of the config's")
    parser.add_argument("--retrain-iters", type=int, help="steps instead of the config's")
    parser.add_argument(
        "--retrain-flags",
        default="",
        metavar='="FLAGS"',
        help="of the retraining alone, in one word",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=VARIANTS,
        default=[],
        metavar="NAME",
        help="these, what they are made of, and dense",
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="devices")
    parser.add_argument("--share-gpus", action="store_true", help="more --jobs than GPUs")
    parser.add_argument("--time-limit", type=float, metavar="MINUTES", help="for the whole command")
    parser.add_argument("--data-only", action="store_true", help="make the data and stop")
    parser.add_argument("--discard-checkpoints", action="store_true", help="of complete variants")
    parser.add_argument("--plan", action="store_true", help="print the stages with their minutes")
    parser.add_argument(
        "--tokens-per-second",
        type=float,
        metavar="RATE",
        help="for --plan: of dense training on one device",
    )
    parser.add_argument("--make", choices=VARIANTS, help=argparse.SUPPRESS)
    return parser.parse_args(own), flags


def session_of(args: argparse.Namespace, work: Work, argv: list[str], began: float) -> Session:
    """What the flags ask for.

    Raises:
        ConfigError: it cannot be met.
    """
    gpus = run_queue.visible_gpus()
    run_queue.check_jobs(args.jobs, "", gpus, args.share_gpus)
    devices = min(args.jobs, len(gpus)) if gpus else args.jobs
    resolve(load_config(work.training("dense").arguments), devices)
    chosen = {"dense", *args.only, *(["ast_slorb"] if INT4 in args.only else [])}
    own = ["--scale", args.scale, "--output", str(args.output)]
    for name in ("dense_iters", "retrain_iters"):
        if getattr(args, name):
            own += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    own += [f"--retrain-flags={args.retrain_flags}"] if args.retrain_flags else []
    launcher = ""
    if devices > 1:
        ranks = ["--standalone", "--nproc-per-node", str(devices)]
        launcher = shlex.join([sys.executable, "-m", "torch.distributed.run", *ranks])
    dense = partial(run_queue.start_process, launcher=launcher)
    log = work.training("dense").log if args.jobs > 1 else None
    return Session(
        work,
        [name for name in VARIANTS if not args.only or name in chosen],
        lambda arguments, extra, _: dense(arguments, extra, log),
        partial(run_queue.start_process, program=("-m", "tools.experiments.compare_ast")),
        args.jobs,
        gpus,
        None if args.time_limit is None else began + 60 * args.time_limit,
        args.discard_checkpoints,
        shlex.join(["python", "-m", "tools.experiments.compare_ast", *argv]),
        [*own, "--", *work.flags],
        lambda line: print(f"[{(time.monotonic() - began) / 60:5.2f} min] {line}", flush=True),
    )


def compare(session: Session) -> str:
    """All variants, what is missing of them; the table, which is also in results.md."""
    work = session.work
    work.output.mkdir(parents=True, exist_ok=True)
    rows = ast_variants.read_rows(work, session.variants)
    missing = [name for name in session.variants if name not in rows]
    if not missing or session.time_is_over():
        return report(session)
    remember(session)
    before = time.monotonic()
    corpus_data.make_data(work.output, work.scale.text, work.corpus)
    session.say(f"data: there after {time.monotonic() - before:.0f} s")
    try:
        if train_dense(session, "dense" in rows):
            make_variants(session, missing)
    except MegasparseError:
        report(session)  # what is there is not lost by what failed
        raise
    return report(session)


def report(session: Session) -> str:
    """The table of what is there, with its files and pictures."""
    output = session.work.output
    rows = ast_variants.read_rows(session.work, session.variants)
    missing = [name for name in session.variants if name not in rows]
    if not rows:
        return f"{output}: nothing is complete yet, missing {', '.join(missing)}"
    found = list(rows.values())
    lines = ast_tables.report(session.work.name, found, missing, commands(output))
    finished_files(output, found, lines)
    draw(output, found)
    return "\n".join(lines)


def train_dense(session: Session, measured: bool) -> bool:
    """The dense model to its end; whether it is there.

    Raises:
        CheckpointError: it was complete, and is gone: another one would not be the same.
    """
    work, task = session.work, session.work.training("dense")
    done = finished.read(task.folder)
    data = corpus_data.data_digest(work.output)
    if done is not None:
        finished.check(done, task.folder, task.arguments, data)
    if (done is not None or measured) and not list_steps(work.checkpoints("dense")):
        raise CheckpointError(
            f"{work.checkpoints('dense')}: the dense model was complete, and is not here any more: "
            "bring it, take another --output, or --time-limit 0 for the table alone"
        )
    if done is not None:
        return True
    seed = load_config(task.arguments).train.seed

    def ended(task: Task, seconds: float | None) -> None:
        finished.record(task.folder, "dense", seed, task.arguments, data, seconds)

    if session.jobs > 1:
        session.say(f"{session.jobs} devices, log: {task.log}")
    return not session.queue(session.start_dense, 1).run([task], ended)


def make_variants(session: Session, missing: Sequence[str]) -> None:
    """Those that are missing, `jobs` at a time; 4 bits once the model is there that it is of.

    Raises:
        MegasparseError: one failed; all others were tried.
    """
    work = session.work
    queue = session.queue(session.start_make, session.jobs)
    queue.goes_on = True

    def ended(task: Task, _: float | None) -> None:
        if session.discard and task.kind not in ("dense", "ast_slorb"):
            shutil.rmtree(work.checkpoints(task.kind), ignore_errors=True)

    order = [name for name in ORDER if name in missing]
    for group in ([n for n in order if n != INT4], [n for n in order if n == INT4]):
        tasks = [
            Task(name, name, work.output / name, ("--make", name, *session.make_arguments))
            for name in group
        ]
        if queue.run(tasks, ended):
            return
    if session.discard and all(work.row_path(name).exists() for name in VARIANTS):
        for name in ("dense", "ast_slorb"):
            shutil.rmtree(work.checkpoints(name), ignore_errors=True)


def remember(session: Session) -> None:
    """This command, for the table."""
    known = commands(session.work.output)
    if session.command not in known:
        write_json(session.work.output / COMMANDS, [*known, session.command], indent=1)


def commands(output: Path) -> list[str]:
    """The commands that have worked on this output, in order."""
    path = output / COMMANDS
    return json.loads(path.read_text()) if path.exists() else []


def finished_files(output: Path, rows: list[ast_variants.Row], lines: list[str]) -> None:
    """results.json and results.md."""
    kept = [{key: value for key, value in row.items() if key != "runs"} for row in rows]
    write_json(output / "results.json", kept, indent=1)
    write_text(output / "results.md", "\n".join(lines) + "\n")


def draw(output: Path, rows: list[ast_variants.Row]) -> None:
    """The perplexities, and the curves of what was retrained where its metrics are here."""
    if not plots.available():
        return
    bars = [(row["variant"], row["perplexity"]) for row in rows]
    plots.perplexities(output / "results.png", bars)
    names = [name for name, _ in bars if name in RETRAINED]
    if names := [name for name in names if (output / name / "metrics.jsonl").exists()]:
        folders = [str(output / name) for name in names]
        plot_runs.main([*folders, "--output", str(output / "pictures"), "--label", *names])


if __name__ == "__main__":
    sys.exit(main())
