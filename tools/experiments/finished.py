"""finished.json: what a comparison keeps of a run that is complete, small enough to travel.

A few kilobytes beside the run's metrics.jsonl and config.yaml. With it a run counts as done even
where its checkpoints are gone, so that a comparison goes on over several machines; it says what the
run was, so that runs with other settings or other data are not put into one table.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import megasparse
from megasparse.atomic_files import write_json
from megasparse.config import RunConfig, load_config, to_dict
from megasparse.errors import ConfigError, DataError
from tools import plot_runs

NAME = "finished.json"
# What makes two runs different; not paths, nor how a run is watched and saved.
GROUPS = ("model", "train", "sparsity", "distillation")
FIELDS = (("data", "split"), ("logging", "eval_interval"), ("logging", "eval_iters"))


@dataclasses.dataclass(frozen=True)
class Finished:
    """One complete run.

    Attributes:
        variant: of the comparison.
        settings: of its flags and YAML file, before they were resolved.
        data: SHA-256 of the tokens.
        seconds: of its process; None: it was interrupted in between.
        hardware: with versions.
        figures: see `figures_of`.
        curve: (step, validation loss, hours of training) of the evaluations.
        alone: no other run shared its device; otherwise its times say nothing.
    """

    variant: str
    seed: int
    settings: dict[str, Any]
    data: str | None
    seconds: float | None
    hardware: str
    date: str
    figures: dict[str, Any]
    curve: list[tuple[int, float, float]]
    alone: bool = True


def settings_of(arguments: Sequence[str]) -> dict[str, Any]:
    """What makes a run, of its flags."""
    tree = to_dict(load_config(arguments))
    chosen = {group: tree[group] for group in GROUPS}
    for group, name in FIELDS:
        chosen.setdefault(group, {})[name] = tree[group][name]
    return chosen


def hardware() -> str:
    """The device of a run on this machine, and versions."""
    gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if gpu else f"CPU ({platform.machine()})"
    return f"{device}, torch {torch.__version__}, megasparse {megasparse.__version__}"


def record(
    folder: Path,
    variant: str,
    seed: int,
    arguments: Sequence[str],
    data: str | None,
    seconds: float | None,
    alone: bool = True,
) -> Finished:
    """Write the file of a run that has just ended."""
    run = plot_runs.read_run(folder, variant)
    done = Finished(
        variant,
        seed,
        settings_of(arguments),
        data,
        seconds,
        hardware(),
        str(datetime.date.today()),
        figures_of(run),
        [(r["step"], r["valid_loss"], r["hours"]) for r in run.rows if r.get("valid_loss")],
        alone,
    )
    write_json(folder / NAME, dataclasses.asdict(done), indent=1)
    return done


def figures_of(run: plot_runs.RunData) -> dict[str, Any]:
    """What the table says of a run alone: the training loss is a mean over its last 5 %, the speed
    the median after its first 10 %, the highest gradient norm that after its first 1 %, in which
    it falls from that of the initial weights."""
    losses = [r["loss"] for r in run.rows if r["loss"] is not None]
    flips = [r["flip_rate"] for r in run.rows if r.get("flip_rate") is not None]
    valid = [r["valid_loss"] for r in run.rows if r.get("valid_loss")]
    speeds = [r["tokens_per_second"] for r in run.rows[len(run.rows) // 10 :]]
    later = run.rows[len(run.rows) // 100 :]
    norms = [(r["grad_norm"], r["step"]) for r in later if r.get("grad_norm") is not None]
    return {
        "steps": run.rows[-1]["step"],
        "tokens": run.rows[-1]["tokens"],
        "training_loss": statistics.fmean(losses[-max(len(losses) // 20, 1) :]),
        "valid_loss": valid[-1],
        "flip_rate_highest": max(flips, default=None),
        "flip_rate_last": flips[-1] if flips else None,
        "grad_norm_highest": max(norms, default=None),
        "tokens_per_second": statistics.median(speeds),
        "hours": run.rows[-1]["hours"],
    }


def read(folder: Path) -> Finished | None:
    """The file of a run; None: it is not complete.

    Raises:
        DataError: the file is not one of these.
    """
    path = folder / NAME
    if not path.exists():
        return None
    try:
        return Finished(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: not what compare_recipes.py writes: {error}") from None


def check(done: Finished, folder: Path, arguments: Sequence[str], data: str | None) -> None:
    """Refuse a complete run that was another than the comparison's.

    Args:
        data: digest of the comparison's tokens; None: they are not here.

    Raises:
        ConfigError: naming the field.
    """
    check_settings(done.settings, folder, arguments)
    check_data(done.data, folder, data)


def check_settings(before: dict[str, Any], path: Path, arguments: Sequence[str]) -> None:
    """Refuse what was made by a run with other settings (`settings_of`) than these flags'.

    Raises:
        ConfigError: naming the path and the field.
    """
    defaults = to_dict(RunConfig())
    for group, fields in settings_of(arguments).items():
        for name, value in fields.items():
            # A field that did not exist yet was what is now its default.
            found = before.get(group, {}).get(name, defaults[group][name])
            if found != value:
                raise ConfigError(
                    f"{path}: finished with {name} {found!r}, this comparison has {value!r}: "
                    "another --output, or remove it"
                )


def check_data(before: str | None, path: Path, now: str | None) -> None:
    """Refuse what was made of other tokens; None: digests that are not known.

    Raises:
        ConfigError: naming the path and both.
    """
    if None not in (before, now) and before != now:
        raise ConfigError(
            f"{path}: finished on tokens of sha256 {before}, here they are {now}: take the "
            "same data_text_document and tokenizer.model to all machines"
        )
