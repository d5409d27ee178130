"""Compare runs: loss against tokens and time, validation loss, flip rate, tokens/s, and more.

    python tools/plot_runs.py runs/dense runs/ste runs/fst --output runs/compared
    python tools/plot_runs.py runs/first --label "FST, 124M" --smooth 20

Writes a PNG a chart, `all.png` with all of them, and `index.html`: one page with the same charts
and a table of the runs, which needs nothing from outside. Runs may still be going on.
"""

from __future__ import annotations

import argparse
import html
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megasparse.atomic_files import write_text
from megasparse.cli import guarded
from megasparse.config import RunConfig, load_config
from megasparse.errors import ConfigError, DataError, StorageError
from megasparse.metrics import plots
from megasparse.metrics.plots import Chart, Points
from megasparse.metrics.schema import read_metrics

Row = dict[str, Any]
FLIPS = "share of entries that flip"
# Metrics drawn over the step: key, title, unit.
BY_STEP = (
    ("tflops_true", "Operations executed", "TFLOP/s a rank"),
    ("retained_l1", "L1 norm kept by the masks", "share of the weight's"),
    ("decay_ratio", "Masked decay beside the gradient", "ratio of norms"),
    ("mvue_amplification", "MVUE amplification", "|MVUE(dZ)|² / |dZ|²"),
)
COLUMNS = [
    "run", "recipe", "steps", "tokens", "training loss, last", "validation loss, last",
    "validation loss, best", "flip rate, last", "tokens/s, median",
]  # fmt: skip


@dataclass(frozen=True)
class RunData:
    """One run as its folder has it.

    Attributes:
        label: shown.
        rows: of metrics.jsonl, with "tokens" (seen) and "hours" (of training) added.
    """

    label: str
    folder: Path
    config: RunConfig
    rows: list[Row]


def read_run(folder: Path, label: str) -> RunData:
    """Read a run.

    Raises:
        DataError: the folder is none of a run, or nothing is recorded yet.
    """
    for name in ("config.yaml", "metrics.jsonl"):
        if not (folder / name).is_file():
            raise DataError(f"{folder}: no {name}, expected the --run-dir of a run")
    config = load_config([], str(folder / "config.yaml"))
    rows, seconds, tokens = [], 0.0, 0
    for row in read_metrics(folder / "metrics.jsonl"):
        now = row["consumed_samples"] * config.model.seq_length
        seconds += (now - tokens) / row["tokens_per_second"]
        tokens = now
        rows.append({**row, "tokens": tokens, "hours": seconds / 3600})
    if not rows:
        raise DataError(f"{folder}: metrics.jsonl holds no step")
    return RunData(label, folder, config, rows)


def labels(folders: Sequence[Path], given: Sequence[str]) -> list[str]:
    """The given labels, else the folders' names, longer where they are equal."""
    if given:
        if len(given) != len(folders):
            raise ConfigError(f"{len(given)} --label for {len(folders)} runs, expected one a run")
        return list(given)
    names = [Path(os.path.realpath(folder)).name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    if len(set(names)) < len(names):
        raise ConfigError("a run is given twice")
    return names


def curve(run: RunData, x: str, y: str) -> list[tuple[float, float]]:
    """Points of two metrics, where a row has the second."""
    return [(row[x], row[y]) for row in run.rows if row.get(y) is not None]


def smoothed(points: Points, window: int) -> list[tuple[float, float]]:
    """Each value as the mean of the latest `window`; from the first full window on."""
    if window <= 1 or len(points) <= window:
        return list(points)
    values = [y for _, y in points]
    return [
        (points[i][0], sum(values[i + 1 - window : i + 1]) / window)
        for i in range(window - 1, len(points))
    ]


def refreshes(run: RunData) -> list[tuple[float, float]]:
    """Flip rates where they were measured anew, over the step."""
    points = [(row["step"], row["flip_rate"]) for row in run.rows if "flip_rate" in row]
    return [p for i, p in enumerate(points) if i == 0 or p[1] != points[i - 1][1]]


def make_charts(runs: Sequence[RunData], window: int) -> list[Chart]:
    """All charts for which a run has figures."""

    def each(points: Callable[[RunData], Points]) -> dict[str, Points]:
        return {run.label: points(run) for run in runs}

    def plain(x: str, y: str) -> dict[str, Points]:
        return each(lambda run: curve(run, x, y))

    def smooth(x: str, y: str) -> dict[str, Points]:
        return each(lambda run: smoothed(curve(run, x, y), window))

    note = f" (mean of {window})" if window > 1 else ""
    loss, seen = f"training loss{note}, nat/token", "tokens"
    # Without evaluations and saves: the sum of the steps.
    unit, scale = ("hours", 1) if max(r.rows[-1]["hours"] for r in runs) > 2 else ("minutes", 60)
    in_hours = smooth("hours", "loss")
    time: dict[str, Points] = {
        label: [(x * scale, y) for x, y in points] for label, points in in_hours.items()
    }
    speed = smooth("step", "tokens_per_second")
    charts = [
        Chart("loss_tokens", "Training loss against tokens", seen, loss, smooth("tokens", "loss")),
        Chart("loss_time", "Training loss against time", f"{unit} of training", loss, time),
        Chart("validation", "Validation loss", seen, "nat/token", plain("tokens", "valid_loss")),
        Chart("flip_rate", "Flip rate at mask refreshes", "step", FLIPS, each(refreshes)),
        Chart("tokens_per_second", "Speed", "step", f"tokens/s{note}", speed),
        *(Chart(key, title, "step", unit, plain("step", key)) for key, title, unit in BY_STEP),
    ]
    return [chart for chart in charts if any(chart.curves.values())]


def table(runs: Sequence[RunData]) -> list[list[str]]:
    """What each run was and came to; the first row is the heading."""
    rows = [COLUMNS]
    for run in runs:
        losses = [row["loss"] for row in run.rows if row["loss"] is not None]
        valid = [row["valid_loss"] for row in run.rows if row.get("valid_loss") is not None]
        flips = [row["flip_rate"] for row in run.rows if row.get("flip_rate") is not None]
        speeds = sorted(row["tokens_per_second"] for row in run.rows)
        rows.append(
            [
                run.label,
                run.config.sparsity.sparsity_recipe,
                f"{run.rows[-1]['step']} of {run.config.train.train_iters}",
                f"{run.rows[-1]['tokens']:,}",
                f"{losses[-1]:.4f}" if losses else "-",
                f"{valid[-1]:.4f}" if valid else "-",
                f"{min(valid):.4f}" if valid else "-",
                f"{flips[-1]:.4f}" if flips else "-",
                f"{speeds[len(speeds) // 2]:,.0f}",
            ]
        )
    return rows


# Two charts a row where there is room, one on a phone; a wide table scrolls by itself. In the dark
# theme the charts, which have no background, are inverted and their hues turned back.
_STYLE = """
:root{color-scheme:light dark}
body{font:15px/1.4 system-ui,sans-serif;margin:1.5em auto;max-width:1180px;padding:0 1em;
color:#222;background:#fff}
h1{font-size:1.5em;overflow-wrap:anywhere}
.scroll{overflow-x:auto}
table{border-collapse:collapse;margin:1em 0}
th,td{padding:.3em .7em;text-align:right;border-bottom:1px solid #8885}
td{white-space:nowrap}
th:first-child,td:first-child{text-align:left}
main{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(420px,100%),1fr));gap:1em}
figure{margin:0}
svg{width:100%;height:auto}
@media(prefers-color-scheme:dark){body{color:#ddd;background:#111}
svg{filter:invert(.93) hue-rotate(180deg)}}
"""


def page(rows: list[list[str]], charts: Sequence[Chart]) -> str:
    """One HTML page with the table and the charts inline; nothing is loaded."""
    heading, *body = [[html.escape(cell) for cell in row] for row in rows]
    cells = "".join(f"<th>{cell}</th>" for cell in heading)
    lines = "".join(
        "<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>\n" for row in body
    )
    figures = "".join(f"<figure>{plots.svg(chart)}</figure>\n" for chart in charts)
    title = html.escape("Runs: " + ", ".join(row[0] for row in rows[1:]))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style></head>\n<body><h1>{title}</h1>\n"
        f'<div class="scroll"><table><tr>{cells}</tr>\n{lines}</table></div>\n'
        f"<main>\n{figures}</main></body></html>\n"
    )


def write(options: argparse.Namespace) -> None:
    """Read the runs, write charts and page, print the table.

    Raises:
        ConfigError, DataError, StorageError: matplotlib, a run or a place to write is missing.
    """
    names = labels(options.runs, options.label)
    runs = [read_run(folder, name) for folder, name in zip(options.runs, names, strict=True)]
    if not plots.available():
        raise ConfigError(plots.MISSING)
    charts = make_charts(runs, options.smooth)
    rows = table(runs)
    output: Path = options.output
    try:
        output.mkdir(parents=True, exist_ok=True)
        for chart in charts:
            plots.save_chart(chart, output / f"{chart.name}.png")
        plots.save_charts(charts, output / "all.png")
        write_text(output / "index.html", page(rows, charts))
    except OSError as error:
        raise StorageError(f"{output}: cannot be written: {error}") from None
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    print(f"{len(charts)} charts: {output / 'index.html'}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument("--label", nargs="+", default=[], help="names shown, one a run")
    parser.add_argument("--output", type=Path, default=Path("runs/compared"), help="folder")
    parser.add_argument("--smooth", type=int, default=10, help="steps that a loss is a mean of")
    options = parser.parse_args(argv)
    return guarded("plot_runs.py", lambda: write(options))


if __name__ == "__main__":
    sys.exit(main())
