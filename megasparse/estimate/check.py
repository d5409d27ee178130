"""Predictions of the estimator beside measurements: points of a file, and a table of them.

A point is a run that somebody has measured: its flags, seconds a step, and where known the seconds
of its kernels and its peak of memory (tools/results/estimate-points-h200.json says what its fields
are).
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megasparse.cli import markdown_table
from megasparse.config import ResolvedConfig, load_config, resolve
from megasparse.config.shapes import layer_parameters
from megasparse.errors import ConfigError
from megasparse.estimate.time import SIZE, GemmTable, layer_launches, layer_time
from megasparse.sparsity.recipe import recipe_of

GIB = 2**30


@dataclass(frozen=True)
class Compared:
    """A point's figures, each (estimated, measured) or None.

    Attributes:
        seconds: of a step; of a layer's micro-batch, if the point is of one layer.
        kernels: seconds of the device's work in it.
        gib: peak of the first rank.
        older: measured by code that has changed since.
    """

    name: str
    source: str
    older: bool
    seconds: tuple[float, float]
    kernels: tuple[float, float] | None
    gib: tuple[float, float] | None


def read_points(path: Path) -> dict[str, Any]:
    """The file's content.

    Raises:
        ConfigError: it is no such file.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text("utf-8"))
        missing = {"hardware", "versions", "date", "sources", "models", "points"} - set(content)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"--check {path}: {error}") from None
    if missing:
        raise ConfigError(f"--check {path}: it has no {', '.join(sorted(missing))}")
    return content


def compare(
    content: dict[str, Any],
    table: GemmTable,
    estimate: Callable[[ResolvedConfig, int], Any],
    root: Path,
) -> list[Compared]:
    """All points of a file.

    Args:
        content: as `read_points` gives it.
        estimate: of a configuration and its ranks (estimate.py's).
        root: folder that the points' `configs/` lies in.
    """
    return [_compared(content, point, table, estimate, root) for point in content["points"]]


def _compared(
    content: dict[str, Any],
    point: dict[str, Any],
    table: GemmTable,
    estimate: Callable[[ResolvedConfig, int], Any],
    root: Path,
) -> Compared:
    flags = shlex.split(f"{content['models'][point['model']]} {point['flags']}")
    flags = [str(root / f) if f.startswith("configs/") else f for f in flags]
    gpus = point.get("gpus", 1)
    config = resolve(load_config(flags), gpus)
    names = (point["name"], point["source"], point.get("older", False))
    if config.model.num_layers == 1:
        return Compared(*names, (layer_seconds(config, table), point["seconds"]), None, None)
    found = estimate(config, gpus)
    kernels, gib = point.get("kernels"), point.get("gib")
    slower = table.data["in_a_step"]["step"]
    return Compared(
        *names,
        (found.time.seconds, point["seconds"]),
        None if kernels is None else (found.time.device / slower, kernels),
        None if gib is None else (found.stages[0].peak_bytes / GIB, gib),
    )


def layer_seconds(config: ResolvedConfig, table: GemmTable) -> float:
    """One layer by itself, a micro-batch with its share of what is done once a step."""
    recipe, train = recipe_of(config), config.train
    micro_batches = train.global_batch_size // train.micro_batch_size
    parts = layer_time(config, recipe, micro_batches, table)
    # The first micro-batch's gradients are kept as they are, the others' added to them.
    numel = sum(one.shape[0] * one.shape[-1] for one in layer_parameters(config.model))
    added = table.moving(3 * SIZE * numel) * (1 - 1 / micro_batches)
    device = (sum(parts.values()) + added) * table.data["in_a_step"]["step"]
    host = layer_launches(config, recipe, micro_batches) * table.data["launch_us"] / 1e6
    return float(max(device, host))


def report(content: dict[str, Any], rows: list[Compared], command: str) -> str:
    """Markdown."""
    lines = [
        f"# The estimator against measurements on {content['hardware']}",
        "",
        f"Measured {content['date']}, {content['versions']}. Command: `{command}`",
        "",
        "Ratios are estimate to measurement. The estimator's constants (launches, bytes, rates "
        "within a step) were taken from some of these runs: kernels of `layer` and `l8`, the "
        "host's time of a launch from `llama`, that of a collective from `scaling` with half of "
        "the tokens a micro-batch. So this says how well one model describes all of them, not how "
        "well it predicts others: on another machine measure first (`--measure`).",
        "",
        *_table([row for row in rows if not row.older]),
        "",
        f"Seconds are within {_worst(rows)[0]:.2f}x of the measurement, memory within "
        f"{_worst(rows)[1]:.2f}x. What does not fit: GPT-2 takes longer than estimated; it was not "
        "profiled. Not in the estimate: matrices of 768 may be slower than the nearest measured "
        "shape, biases, a GELU that is not fused, and two runs at a time on one host. Of `llama`, "
        "FST in the FFN launches more kernels than the dense run and took less time, which one "
        "price for a launch cannot say. With tensor parallelism ranks "
        "wait for whichever host is behind, which is not in the estimate.",
        "",
        "## By code that has changed since",
        "",
        "Estimated as the code is now, so these are no test of it: most were larger by what each "
        "source says. But tp 2, with more kernels than today, took less than its host is "
        "estimated to need: a launch may cost less than here.",
        "",
        *_table([row for row in rows if row.older]),
        "",
        "Sources:",
        "",
        *(f"- {name}: {_code(text)}" for name, text in content["sources"].items()),
    ]
    return "\n".join(lines) + "\n"


def _worst(rows: list[Compared]) -> tuple[float, float]:
    """The largest factor between estimate and measurement, of seconds and of memory."""

    def factor(pair: tuple[float, float]) -> float:
        return max(pair[0] / pair[1], pair[1] / pair[0])

    judged = [row for row in rows if not row.older]
    gib = [factor(row.gib) for row in judged if row.gib is not None]
    return max(factor(row.seconds) for row in judged), max(gib, default=1.0)


def _table(rows: list[Compared]) -> list[str]:
    figures = ("ms", "ms of kernels", "GiB")
    columns = [n for figure in figures for n in (f"{figure}, estimated", "measured", "ratio")]
    cells = [
        [
            row.name,
            row.source,
            *_cells(row.seconds, 1e3),
            *_cells(row.kernels, 1e3),
            *_cells(row.gib),
        ]
        for row in rows
    ]
    return markdown_table(["run", "source", *columns], cells, text_columns=2)


def _cells(pair: tuple[float, float] | None, unit: float = 1.0) -> list[str]:
    if pair is None:
        return ["-"] * 3
    estimated, measured = pair
    ratio = f"{estimated / measured:.2f}"
    return [f"{unit * estimated:,.1f}", f"{unit * measured:,.1f}", ratio]


def _code(text: str) -> str:
    return f"`{text}`" if text.startswith("python ") and ": " not in text else text
