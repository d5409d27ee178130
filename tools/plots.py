"""Figures of the tools; the only file that imports matplotlib (extras `test` and `dev`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

try:
    import matplotlib
except ImportError:  # training does not need it
    matplotlib = None  # type: ignore[assignment]

MISSING = "matplotlib is not installed (it is in the extras test and dev)"


def available() -> bool:
    return matplotlib is not None


def decay_search(
    path: Path,
    curves: Mapping[str, Sequence[tuple[int, float]]],
    ratios: Sequence[tuple[float, float]],
    feasible: tuple[float, float],
    choice: float | None,
) -> None:
    """Flip rates over steps, one line a run, and mu over the decay with the feasible band.

    curves: (step, flip rate) by run; ratios: (decay, mu); choice: the decay that is marked.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for name, points in curves.items():
        style = {"color": "black", "linewidth": 2.0} if name == "dense" else {"linewidth": 1.0}
        left.plot(*zip(*points), marker=".", label=name, **style)
    left.set(xlabel="step of the mask refresh", ylabel="flip rate", title="Flip rates")
    left.legend(fontsize="small")
    right.axhspan(*feasible, color="tab:green", alpha=0.15, label="feasible")
    right.semilogx(*zip(*ratios), marker="o", color="tab:blue")
    if choice is not None:
        right.axvline(choice, color="tab:green", linestyle="--", label=f"taken: {choice:g}")
    right.set(xlabel="masked decay", ylabel="mu, flip rate relative to dense", title="Choice")
    right.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def perplexities(path: Path, rows: Sequence[tuple[str, float]]) -> None:
    """A bar a variant, the first one's height as a line across."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    names, values = zip(*rows)
    bars = axes.bar(range(len(rows)), values, color="tab:blue")
    axes.bar_label(bars, fmt="%.2f", fontsize="small")
    axes.axhline(values[0], color="black", linewidth=0.8, linestyle="--")
    axes.set_xticks(range(len(rows)), names, rotation=25, ha="right")
    if max(values) > 10 * min(values):
        axes.set_yscale("log")
    axes.set(ylabel="perplexity on held-out text", title="One dense model made 2:4")
    figure.savefig(path, dpi=120)
