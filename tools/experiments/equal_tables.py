"""The tables and the chart of equal_time.py."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from megasparse.cli import markdown_table
from megasparse.metrics.plots import Chart
from tools.experiments.finished import Finished
from tools.experiments.recipe_tables import mean_of, nats, percent

Row = dict[str, Any]
PARTS = (0.25, 0.5, 0.75, 1.0)  # of the time, for which losses are shown


def row_of(run: Finished, minutes: float, rate: float, dense: Finished | None) -> Row:
    """The figures of one run beside dense FP8 of the same seed (None: not there).

    Args:
        minutes: that the run was given.
        rate: its tokens/s.
    """
    steps, tokens = run.figures["steps"], run.figures["tokens"]
    curve = [(step / steps * tokens / rate / 60, loss) for step, loss, _ in run.curve]
    final = run.figures["valid_loss"]
    row = {
        "variant": run.variant,
        "seed": run.seed,
        "hardware": run.hardware,
        "date": run.date,
        "minutes": minutes,
        "tokens_per_second": rate,
        "steps": steps,
        "tokens": tokens,
        "valid_loss": final,
        "curve": curve,
    }
    if dense is None:
        return {**row, "nats": None, "gap": None, "share": None}
    last = dense.figures["valid_loss"]
    reached = share_until(curve, last)
    share = None if reached is None else reached / minutes
    return {**row, "nats": final - last, "gap": final / last - 1, "share": share}


def share_until(curve: Sequence[tuple[float, float]], loss: float) -> float | None:
    """The minutes after which a curve is at `loss` (linear in between); None: it never is."""
    before: tuple[float, float] | None = None
    for now, found in curve:
        if found <= loss:
            if before is None or before[1] == found:
                return now
            return before[0] + (now - before[0]) * (before[1] - loss) / (before[1] - found)
        before = (now, found)
    return None


def report(
    rows: Sequence[Row],
    variants: Sequence[str],
    rates: Mapping[str, float],
    minutes: float,
    command: str,
) -> list[str]:
    """What was run, the table of ends, the table of losses on the way, and the speeds."""
    where = "; ".join(sorted({row["hardware"] for row in rows}))
    groups = {name: [row for row in rows if row["variant"] == name] for name in variants}
    base = next((row["tokens_per_second"] for row in rows if row["variant"] == "dense_fp8"), None)
    ends, on_the_way = [], []
    for name, group in groups.items():
        if not group:
            continue
        known = [row for row in group if row["nats"] is not None]
        rate = group[0]["tokens_per_second"]
        loss = mean_of(group, "valid_loss")
        ends.append(
            [
                name,
                str(len(group)),
                f"{rate:,.0f}",
                "-" if base is None else f"{rate / base:.3f}",
                f"{group[0]['steps']:,}",
                f"{group[0]['tokens'] / 1e6:,.1f}M",
                f"{loss:.4f}",
                nats([row["nats"] for row in known]),
                percent([row["gap"] for row in known]),
                _reached(known),
            ]
        )
        losses = [[_at(row["curve"], part * minutes) for part in PARTS] for row in group]
        means = [sum(column) / len(column) for column in zip(*losses, strict=True)]
        on_the_way.append([name, *(f"{mean:.4f}" for mean in means)])
    columns = ["variant", "seeds", "tokens/s", "to dense FP8", "steps", "tokens"]
    columns += ["validation loss", "nats to dense FP8", "% to dense FP8", "time to its end"]
    return [
        f"# Recipes compared in {minutes:g} minutes of one GPU",
        "",
        f"{datetime.date.today()}, {where}; all linears of the blocks 2:4, CUDA graphs on.",
        "",
        f"    {command}",
        "",
        *markdown_table(columns, ends),
        "",
        "Time to its end: the share of the time after which a run's loss is that of dense FP8 at "
        "its end. Every run's learning rate is at its lowest at its own end alone.",
        "",
        "## On the way",
        "",
        "Validation loss after parts of the time.",
        "",
        *markdown_table(["variant", *(f"{part * minutes:g} min" for part in PARTS)], on_the_way),
        "",
        "## Speeds",
        "",
        "tokens/s, each alone on the GPU.",
        "",
        *markdown_table(["measured", "tokens/s"], [[n, f"{r:,.0f}"] for n, r in rates.items()]),
        "",
    ]


def _reached(rows: Sequence[Row]) -> str:
    """The mean share of the time until dense FP8's end, of runs beside one of its seeds."""
    if not rows:
        return "-"
    share = mean_of(rows, "share")
    return "not reached" if share is None else f"{100 * share:.0f} %"


def _at(curve: Sequence[tuple[float, float]], minutes: float) -> float:
    """A curve's loss at a time, linear in between; its first or last beyond."""
    before = curve[0]
    for now in curve:
        if now[0] >= minutes:
            span = now[0] - before[0]
            part = 1.0 if span == 0 else (minutes - before[0]) / span
            return before[1] + max(part, 0.0) * (now[1] - before[1])
        before = now
    return before[1]


def chart(rows: Sequence[Row], variants: Sequence[str], minutes: float) -> Chart:
    """Validation loss over GPU minutes, of each variant's first seed; after a sixth of the time."""
    curves = {}
    for name in variants:
        first = next((row for row in rows if row["variant"] == name), None)
        if first is not None:
            curves[name] = [point for point in first["curve"] if point[0] >= minutes / 6]
    return Chart("equal_time", "Loss over time on one GPU", "minutes", "validation loss", curves)
