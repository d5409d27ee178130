"""Pictures of runs; the only file that imports matplotlib (the extra `plot`)."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megasparse.extras import advice

try:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter
except ImportError:  # training does not need it
    matplotlib = None  # type: ignore[assignment]

MISSING = f"matplotlib is not installed: {advice('matplotlib')}"
Points = Sequence[tuple[float, float]]


def available() -> bool:
    """Whether matplotlib is here."""
    return matplotlib is not None


@dataclass(frozen=True)
class Chart:
    """One pair of axes with a line a run.

    Attributes:
        name: of the file.
        curves: points by label; a label without points is left out.
        logarithmic: the vertical axis.
    """

    name: str
    title: str
    x: str
    y: str
    curves: Mapping[str, Points]
    logarithmic: bool = False


def _figure(width: float, height: float) -> Any:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def draw(axes: Any, chart: Chart) -> None:
    """The chart on matplotlib's axes; a label has the same colour in every chart."""
    for number, (label, points) in enumerate(chart.curves.items()):
        if points:
            style = {"color": f"C{number % 10}", "linewidth": 1.3}
            if len(points) < 30:
                style |= {"marker": ".", "markersize": 5}
            axes.plot(*zip(*points), label=label, **style)
    axes.set(xlabel=chart.x, ylabel=chart.y, title=chart.title)
    if chart.logarithmic:
        axes.set_yscale("log")
    if chart.x == "tokens":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.25)
    if any(chart.curves.values()):
        axes.legend(fontsize="small")


def save_chart(chart: Chart, path: Path) -> None:
    """One chart as PNG."""
    figure = _figure(6.4, 4.2)
    draw(figure.subplots(), chart)
    figure.savefig(path, dpi=110)


def save_charts(charts: Sequence[Chart], path: Path, columns: int = 2) -> None:
    """All charts in one PNG."""
    rows = -(-len(charts) // columns)
    figure = _figure(5.6 * columns, 3.6 * rows)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for one, chart in zip(axes, charts):
        draw(one, chart)
    for one in axes[len(charts) :]:
        one.set_axis_off()
    figure.savefig(path, dpi=90)


def svg(chart: Chart) -> str:
    """The chart as an SVG element for a page; text stays text."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": chart.name}):
        figure = _figure(6.4, 4.2)
        draw(figure.subplots(), chart)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None}, transparent=True)
    whole = text.getvalue()
    return whole[whole.index("<svg") :]


def patterns(
    path: Path, shares: Mapping[str, Sequence[float]], retained: Mapping[str, tuple[float, float]]
) -> None:
    """How often each 2:4 pattern occurs, by layer, and how much of each weight is kept.

    shares: share of every pattern by layer; retained: (L1, L2) shares by layer.
    """
    names = list(shares)
    figure = _figure(12, 2.2 + 0.32 * len(names))
    left, right = figure.subplots(1, 2, width_ratios=(3, 2), sharey=True)
    image = left.imshow(
        [list(shares[name]) for name in names],
        aspect="auto",
        cmap="viridis",
        interpolation="nearest",
    )
    figure.colorbar(image, ax=left, label="share of blocks")
    count = len(next(iter(shares.values())))
    left.set(title=f"The {count} patterns (even: {1 / count:.4f})", xlabel="pattern")
    left.set_yticks(range(len(names)), [_short(name) for name in names], fontsize="small")
    for offset, (label, number) in enumerate((("L1", 0), ("L2", 1))):
        positions = [row + 0.4 * (offset - 0.5) for row in range(len(names))]
        right.barh(positions, [retained[name][number] for name in names], 0.38, label=label)
    right.set(title="Norm kept by the mask", xlabel="share of the weight's norm", xlim=(0, 1))
    for place, label, color in ((0.5, "L1", "C0"), (0.5**0.5, "L2", "C1")):
        right.axvline(place, color="white", linewidth=2.4)  # seen on the bars and between them
        right.axvline(place, color=color, linestyle=":", label=f"{label}, random mask")
    figure.legend(
        *right.get_legend_handles_labels(), fontsize="small", loc="outside lower right", ncols=4
    )
    figure.savefig(path, dpi=110)


def _short(name: str) -> str:
    return (
        name.removeprefix("decoder.layers.").removeprefix("encoder.layers.").removesuffix(".weight")
    )


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
    figure = _figure(11, 4.2)
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
    figure = _figure(8, 4.2)
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
