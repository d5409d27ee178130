"""The runs of a comparison of recipes: their flags and folders, what is done, and what is not.

A tail is not trained from its beginning where the run that it begins as is trained here too: that
one saves where its tails begin, and they go on from there (`--branch-from`).
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path

from megasparse.atomic_files import write_json, write_text
from megasparse.checkpoint.directory import step_folder
from megasparse.config import load_config
from megasparse.config.batches import DEFAULT_ITERS
from tools.experiments import corpus_data, finished
from tools.experiments.recipe_variants import ALL_VARIANTS, BRANCHES
from tools.experiments.run_queue import RunQueue, Task

SAVES = 6  # of a run that others branch from; BRANCHES begin where it saves


@dataclass
class Work:
    """One comparison.

    Attributes:
        output: where everything goes.
        config: name of a file in configs/experiments/.
        flags: of every run.
        queue: runs them.
        rates: flags of a variant's own learning rate.
        table: name of the files with the results.
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
    rates: dict[str, list[str]] = field(default_factory=dict)
    table: str = "results"
    discard: bool = False
    command: str = "python -m tools.experiments.compare_recipes"

    def task(self, variant: str, seed: int, folder: str = "", more: Sequence[str] = ()) -> Task:
        """A run: the comparison's flags, the variant's, and some of its own."""
        rate = self.rates.get(variant, [])
        place = f"{variant}-seed-{seed}"
        run_dir = self.output / (folder or (f"own-rates/{place}" if rate else place))
        flags = [*self.flags, *flags_of(self, variant), *rate, *more, "--seed", str(seed)]
        arguments = corpus_data.run_arguments(self.config, self.output, run_dir, flags)
        name = f"{' '.join([variant, *rate, *more])}, seed {seed}"
        return Task(variant, name, run_dir, tuple(arguments))


def flags_of(work: Work, variant: str) -> list[str]:
    """What makes a variant, after the flags of all."""
    flags = ALL_VARIANTS[variant]
    if variant != "half":
        return flags
    model = load_config(["--config", str(corpus_data.config_path(work.config)), *work.flags]).model
    width = model.ffn_hidden_size or 4 * model.hidden_size
    return [*flags, "--ffn-hidden-size", str(width // 2)]


def with_branches(tasks: dict[Task, tuple[str, int]]) -> dict[Task, tuple[str, int]]:
    """The same runs, where tails go on from the run that they begin as.

    That one must be among them, not done yet or with its checkpoints, have the same settings but
    for its sparsity, and steps that its saves divide.

    Args:
        tasks: with variant and seed.
    """
    runs = {key: task for task, key in tasks.items()}
    starts: dict[Task, Path] = {}
    bases: set[Task] = set()
    for task, (variant, seed) in tasks.items():
        name, share = BRANCHES.get(variant, ("", Fraction(1)))
        base = runs.get((name, seed))
        if base is None or finished.read(task.folder) is not None or not _alike(base, task):
            continue
        steps = _steps(base)
        start = step_folder(base.folder / "checkpoints", int(steps * share))
        if steps % SAVES == 0 and (finished.read(base.folder) is None or start.is_dir()):
            starts[task] = start
            bases.add(base)
    found = {}
    for task, key in tasks.items():
        more: tuple[str, ...] = ()
        if task in starts:
            more = ("--branch-from", str(starts[task]))
        elif task in bases:
            more = ("--save-interval", str(_steps(task) // SAVES), "--keep-last", str(SAVES))
        arguments = (*task.arguments, *more)
        found[replace(task, arguments=arguments, needs=starts.get(task))] = key
    return found


def _steps(task: Task) -> int:
    return load_config(task.arguments).train.train_iters or DEFAULT_ITERS


def _alike(base: Task, tail: Task) -> bool:
    """Whether two runs have the same settings but for their sparsity."""
    one, other = (finished.settings_of(task.arguments) for task in (base, tail))
    return {**one, "sparsity": 0} == {**other, "sparsity": 0}


def train(work: Work, tasks: dict[Task, tuple[str, int]]) -> list[Task]:
    """Run what is not finished; what the time limit left out of it.

    Args:
        tasks: with the variant and seed that their records name.
    """
    work.output.mkdir(parents=True, exist_ok=True)
    tasks = with_branches(tasks)
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
        elif work.text.whole_machine:
            corpus_data.check_fresh(work.output, task.arguments)

    def ended(task: Task, seconds: float | None) -> None:
        variant, seed = tasks[task]
        alone = not work.queue.shares()
        finished.record(task.folder, variant, seed, task.arguments, data, seconds, alone)
        needed = any(
            other.needs is not None and other.needs.is_relative_to(task.folder) for other in tasks
        )
        if work.discard and not needed:
            shutil.rmtree(task.folder / "checkpoints", ignore_errors=True)

    left = work.queue.run([task for task, run in done.items() if run is None], ended)
    if work.discard and not left:
        for task in tasks:
            shutil.rmtree(task.folder / "checkpoints", ignore_errors=True)
    return left


def write(output: Path, name: str, rows: list[dict], lines: list[str]) -> None:
    """NAME.json and NAME.md."""
    write_json(output / f"{name}.json", rows, indent=1)
    write_text(output / f"{name}.md", "\n".join(lines) + "\n")
