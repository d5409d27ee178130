"""Choose the masked decay of FST (or SR-STE, AST) before a long run, as FST's paper does.

Short runs over a grid of decays, each the first steps of the real run (its own schedule, cut off),
and one dense run that only watches what its masks would be. The flip rate r of a candidate at an
early step t0 of the warm-up, relative to the dense run's, is mu = r'_t0 / r_t0 (FST, Hu et al.,
ICML 2024). A decay is feasible with mu in [0.60, 0.95]: above, masks flip as if there were no
decay; below, they are frozen. Of the feasible ones the one with mu nearest the middle is taken.

    python tools/search_decay.py --config configs/quickstart.yaml --steps 40 --num-ranks 2
    python tools/search_decay.py --config configs/models/gpt2_124m.yaml \\
        --config configs/recipes/fst_gpt2.yaml --steps 400 \\
        --grid 1e-5 3e-5 6e-5 1e-4 2e-4 --output runs/decay_search

All other flags are those of launch/pretrain.py. A search that was interrupted goes on where it was:
finished runs are not repeated. Exit code 1 when no decay of the grid is feasible.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megasparse.atomic_files import write_json
from megasparse.cli import guarded
from megasparse.config import ResolvedConfig, load_config, resolve, to_dict
from megasparse.errors import ConfigError, MegasparseError, NumericsError
from megasparse.metrics import plots
from megasparse.metrics.schema import read_metrics
from megasparse.progress import progress
from megasparse.sparsity.decay_choice import FEASIBLE, Run, choose, judge, table
from megasparse.sparsity.recipe import make_recipe

GRID = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
LAUNCH = Path(__file__).parents[1] / "launch" / "pretrain.py"
POLL_SECONDS = 0.3


@dataclass(frozen=True)
class Search:
    """What the runs share: the user's run flags, where the search ends, and on how many ranks."""

    flags: tuple[str, ...]
    steps: int
    ranks: int
    output: Path
    interval: int  # steps between mask refreshes

    def arguments(self, decay: float | None, train_iters: int) -> list[str]:
        """Flags of the run with `decay`, or of the dense one, after the user's own."""
        own = ["--track-flip-rate", "--no-resume", "--eval-iters", "0", "--sample-tokens", "0"]
        own += ["--save", "none", "--save-interval", "none", "--tensorboard-dir", "none"]
        own += ["--exit-interval", str(self.steps)]
        own += ["--run-dir", str(self.output / run_name(decay))]
        if decay is not None:
            own += ["--masked-decay", repr(decay), "--dense-warmup-fraction", "0"]
            return [*self.flags, *own]
        # The whole search is warm-up; a fraction must stay below 1.
        warmup = min(self.steps / train_iters, 1 - 1e-9)
        own += ["--dense-warmup-fraction", repr(warmup), "--dense-tail-fraction", "0"]
        return [*self.flags, *own]


def run_name(decay: float | None) -> str:
    """The name of a decay's run; None: the dense one."""
    return "dense" if decay is None else f"decay-{decay:g}"


def prepare(options: argparse.Namespace, flags: Sequence[str]) -> tuple[Search, ResolvedConfig]:
    """The search and the run's own configuration; ConfigError when they do not fit."""
    config = resolve(load_config(flags), options.num_ranks)
    sparsity, train = config.sparsity, config.train
    recipe = make_recipe(
        sparsity.sparsity_recipe, mask_update_interval=sparsity.mask_update_interval
    )
    if recipe.regulariser == "none":
        raise ConfigError(
            f"sparsity_recipe {recipe.name} has no masked decay to search, expected fst, sr_ste or "
            "ast"
        )
    interval = recipe.mask_update_interval
    if not interval < options.steps <= train.train_iters:
        raise ConfigError(
            f"--steps {options.steps}, expected more than mask_update_interval {interval} (flips "
            f"are counted at the second refresh) and at most train_iters {train.train_iters}"
        )
    if min(options.grid) <= 0:
        raise ConfigError(f"--grid holds {min(options.grid):g}, expected decays above 0")
    search = Search(tuple(flags), options.steps, options.num_ranks, options.output, interval)
    return search, config


def read_run(search: Search, decay: float | None) -> Run | None:
    """The run as its metrics have it; None when it has not reached the last step."""
    folder = search.output / run_name(decay)
    rows = [r for r in read_metrics(folder / "metrics.jsonl") if r["step"] <= search.steps]
    if (folder / "diverged").exists():
        return Run(run_name(decay), decay, (), None, diverged=True)
    if not rows or rows[-1]["step"] != search.steps:
        return None
    # A row shows the refresh before its own step; the first one had nothing to be compared with.
    curve = tuple(
        (row["step"] - 1, row["flip_rate"])
        for row in rows
        if row["step"] > 1 and (row["step"] - 1) % search.interval == 0
    )
    return Run(run_name(decay), decay, curve, rows[-1]["loss"])


def execute(search: Search, config: ResolvedConfig, decay: float | None, bar: Any) -> Run:
    """The finished run: read if it is there, else run now. `bar` counts steps."""
    folder = search.output / run_name(decay)
    arguments = search.arguments(decay, config.train.train_iters)
    settings = to_dict(resolve(load_config(arguments), search.ranks))
    record = folder / "search.json"
    if record.exists() and json.loads(record.read_text()) == settings:
        run = read_run(search, decay)
        if run is not None:
            bar.update(search.steps)
            return run
    elif folder.exists() and not record.exists():
        raise ConfigError(f"{folder} is not a run of a search, choose another --output")
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    write_json(record, settings)
    _launch(search, arguments, folder, bar)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # of no use to anyone
    run = read_run(search, decay)
    if run is None:
        raise MegasparseError(f"{folder}: the run ended before step {search.steps}")
    return run


def _launch(search: Search, arguments: Sequence[str], folder: Path, bar: Any) -> None:
    """Run launch/pretrain.py to its end, its output in log.txt, its steps on the bar."""
    command = [sys.executable]
    if search.ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(search.ranks)]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    paths = [str(LAUNCH.parents[1]), *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    log, shown = folder / "log.txt", 0
    with (
        log.open("wb") as output,
        subprocess.Popen(
            [*command, str(LAUNCH), *arguments], stdout=output, stderr=output, env=environment
        ) as process,
    ):
        try:
            while process.poll() is None:
                shown = _advance(bar, folder, shown)
                try:
                    process.wait(POLL_SECONDS)
                except subprocess.TimeoutExpired:
                    continue
        except BaseException:  # an interrupted search leaves no run behind
            process.terminate()
            raise
    _advance(bar, folder, shown)
    text = log.read_text(errors="replace")
    if process.returncode and NumericsError.__name__ in text:
        (folder / "diverged").touch()
        return
    # It ends by --exit-interval, with code 75, of which torchrun makes 1: what counts is that it
    # came to its last step.
    rows = read_metrics(folder / "metrics.jsonl")
    if process.returncode and not (rows and rows[-1]["step"] == search.steps):
        last = "\n".join(text.splitlines()[-15:])
        raise MegasparseError(f"{folder.name} ended with exit code {process.returncode}:\n{last}")


def _advance(bar: Any, folder: Path, shown: int) -> int:
    done = len(read_metrics(folder / "metrics.jsonl"))
    bar.update(done - shown)
    return done


def search_decay(options: argparse.Namespace, flags: Sequence[str]) -> int:
    """Run the search, print the table and write results.json and the figure; the exit code."""
    search, config = prepare(options, flags)
    decays = [None, *sorted(set(options.grid))]
    runs = []
    with progress(desc="search", total=len(decays) * search.steps, unit="step") as bar:
        for decay in decays:
            bar.set_description(run_name(decay))
            runs.append(execute(search, config, decay, bar))
    dense, others = runs[0], runs[1:]
    if dense.diverged:
        raise MegasparseError(f"the dense run diverged, see {search.output / 'dense' / 'log.txt'}")
    candidates = judge(dense, others)
    choice, reason = choose(candidates)
    print(f"flip rates at step {dense.curve[-1][0]}, mu relative to dense; feasible: {FEASIBLE}")
    print(table(dense, candidates, choice))
    print(f"taken: {reason}" if choice is not None else reason)
    results = {
        "measured_at_step": dense.curve[-1][0],
        "feasible_mu": FEASIBLE,
        "choice": choice,
        "reason": reason,
        "dense": asdict(dense),
        "candidates": [asdict(c) for c in candidates],
        "curves": {run.name: run.curve for run in runs},
        "flags": list(flags),
    }
    path = search.output / "results.json"
    write_json(path, results, indent=1)
    print(f"results: {path}")
    if plots.available():
        figure = search.output / "decay_search.png"
        curves = {run.name: run.curve for run in runs if run.curve}
        ratios = [(c.decay, c.mu) for c in candidates if c.mu is not None]
        plots.decay_search(figure, curves, ratios, FEASIBLE, choice)
        print(f"figure: {figure}")
    else:
        print(f"no figure: {plots.MISSING}")
    return 0 if choice is not None else 1


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--grid", type=float, nargs="+", default=GRID, metavar="DECAY")
    parser.add_argument("--steps", type=int, required=True, help="of each run; within the warm-up")
    parser.add_argument("--num-ranks", type=int, default=1, help="processes of each run")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/decay_search"), help="folder of all runs"
    )
    options, flags = parser.parse_known_args(argv)
    return guarded("search_decay.py", lambda: search_decay(options, flags))


if __name__ == "__main__":
    sys.exit(main())
