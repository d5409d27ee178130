"""Learning rates of a comparison of recipes: the best of each variant, and runs with it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from megasparse.config import load_config
from megasparse.errors import ConfigError
from tools.experiments import finished, recipe_tables
from tools.experiments.recipe_runs import Work, train, write


def sweep(
    work: Work, rates: Sequence[float], more: Mapping[str, Sequence[str]] | None = None
) -> str:
    """Train the variants with each learning rate; the table, also in sweep.md, with the best's
    flags.

    `min_lr` is the same share of the rate as in the configuration. Rows of variants that are not
    swept now stay in sweep.json.

    Args:
        more: flags of each variant, such as its number of steps.
    """
    seed = work.seeds[0]
    tasks = {
        (variant, rate): work.task(
            variant,
            seed,
            f"sweep/{_folder(variant)}lr-{rate:g}-seed-{seed}",
            [*(more or {}).get(variant, ()), *_flags(work, rate)],
        )
        for variant in work.variants
        for rate in rates
    }
    keys = {task: (variant, seed) for (variant, _), task in tasks.items()}
    missing = [task.name for task in train(work, keys)]
    found = {key: run for key, task in tasks.items() if (run := finished.read(task.folder))}
    if not found:
        return f"{work.output}: nothing is complete yet, missing {', '.join(missing)}"
    lines = recipe_tables.heading("Learning rates", list(found.values()), work.command)
    for variant in work.variants:
        runs = [(rate, run) for (name, rate), run in found.items() if name == variant]
        if not runs:
            continue
        best = min(runs, key=lambda pair: pair[1].figures["valid_loss"])[0]
        edge = len(runs) > 1 and best in (min(rates), max(rates))
        lines += [
            f"## {variant}",
            "",
            *recipe_tables.sweep_table(runs),
            "",
            f"Lowest validation loss: `-- {' '.join(_flags(work, best))}`"
            f"{', at the end of what was tried: try further' if edge else ''}.",
            "",
        ]
    rows = [
        {"variant": variant, "lr": rate, "seed": run.seed, **run.figures}
        for (variant, rate), run in found.items()
    ]
    lines += recipe_tables.missing_line(missing)
    rows += [row for row in _read(work) if row.get("variant", "dense") not in work.variants]
    write(work.output, "sweep", rows, lines)
    return "\n".join(lines)


def own_rates(work: Work) -> dict[str, list[str]]:
    """Flags of the best rate of each swept variant, where it is not the configuration's.

    Raises:
        ConfigError: nothing was swept.
    """
    rows = _read(work)
    if not rows:
        raise ConfigError(f"--own-rates: {work.output}/sweep.json is not there: --sweep-lr first")
    shared = load_config(work.task("dense", work.seeds[0]).arguments).train.lr
    chosen = {}
    for variant in work.variants:
        group = [row for row in rows if row.get("variant", "dense") == variant]
        best = min(group, key=lambda row: row["valid_loss"])["lr"] if group else shared
        if best != shared:
            chosen[variant] = _flags(work, best)
    return chosen


def _folder(variant: str) -> str:
    return "" if variant == "dense" else f"{variant}-"


def _flags(work: Work, rate: float) -> list[str]:
    train_config = load_config(work.task("dense", work.seeds[0]).arguments).train
    low = rate * train_config.min_lr / train_config.lr
    return ["--lr", f"{rate:g}", "--min-lr", f"{low:g}"]


def _read(work: Work) -> list[dict]:
    path = work.output / "sweep.json"
    return json.loads(path.read_text()) if path.exists() else []
