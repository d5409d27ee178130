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
from megasparse.config.graphs import graphs_refusal
from megasparse.errors import ConfigError
from megasparse.estimate.time import GemmTable
from megasparse.input_files import read_regular

GIB = 2**30


@dataclass(frozen=True)
class Compared:
    """A point's figures, each (estimated, measured) or None.

    Attributes:
        seconds: of a step.
        kernels: seconds of the device's work in it.
        gib: peak of the first rank.
        captured: with CUDA graphs.
    """

    name: str
    source: str
    seconds: tuple[float, float]
    kernels: tuple[float, float] | None
    gib: tuple[float, float] | None
    captured: bool


def read_points(path: Path) -> dict[str, Any]:
    """The file's content.

    Raises:
        ConfigError: it is no such file.
    """
    try:
        content: dict[str, Any] = json.loads(read_regular(path))
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
    names = (point["name"], point["source"])
    found = estimate(config, gpus)
    kernels, gib = point.get("kernels"), point.get("gib")
    slower = table.data["in_a_step"]["step"]
    return Compared(
        *names,
        (found.time.seconds, point["seconds"]),
        None if kernels is None else (found.time.device / slower, kernels),
        None if gib is None else (found.stages[0].peak_bytes / GIB, gib),
        graphs_refusal(config) is None,
    )


def report(content: dict[str, Any], rows: list[Compared], command: str) -> str:
    """Markdown."""
    lines = [
        f"# The estimator against measurements on {content['hardware']}",
        "",
        f"Measured {content['date']}, {content['versions']}. Command: `{command}`",
        "",
        "Ratios are estimate to measurement. Rates of GEMMs and of memory were measured apart. "
        "Bytes a parameter in the update, the rate of collectives and the host's time between "
        "steps come from these runs, so the table says how well one model describes all of them. "
        "On another machine measure first (`--measure`).",
        "",
        *_table(rows),
        "",
        f"Steps with CUDA graphs are within {_worst(rows, True)[0]:.2f}x of the measurement, all "
        f"within {_worst(rows, False)[0]:.2f}x; memory within {_worst(rows, False)[1]:.2f}x. "
        "Without graphs the host's time for a launch decides, which differs from machine to "
        "machine. Matrices of 768 are slower than the nearest measured shape.",
        "",
        "Sources:",
        "",
        *(f"- {name}: {_code(text)}" for name, text in content["sources"].items()),
    ]
    return "\n".join(lines) + "\n"


def _worst(rows: list[Compared], captured: bool) -> tuple[float, float]:
    """The largest factor between estimate and measurement, of seconds and of memory.

    Args:
        captured: of the runs with CUDA graphs alone.
    """

    def factor(pair: tuple[float, float]) -> float:
        return max(pair[0] / pair[1], pair[1] / pair[0])

    judged = [row for row in rows if row.captured or not captured]
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
