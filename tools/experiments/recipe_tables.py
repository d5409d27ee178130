"""The tables of compare_recipes.py: from the files of complete runs to rows and Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from megasparse.cli import markdown_table
from tools.experiments.finished import Finished

Row = dict[str, Any]


def row_of(run: Finished, dense: Finished | None, base: Finished | None) -> Row:
    """The figures of one run, and beside runs of the same seed: the dense one, and for an ablation
    the one that it changes (`base`); None: not there.

    `dense_share` is the share of the dense run's steps after which it had the variant's final
    validation loss (linear between evaluations; 1: not before its end), `hours_to` the time until
    the variant's loss was at most 1.02 times the dense run's last, `gaps` by step of an evaluation.
    """
    final = run.figures["valid_loss"]
    row = {"variant": run.variant, "seed": run.seed, **run.figures, "seconds": run.seconds}
    if not run.alone:
        row |= dict.fromkeys(("seconds", "tokens_per_second", "hours"))
    row["base"] = None if base is None else base.variant
    row["gap_to_base"] = None if base is None else final / base.figures["valid_loss"] - 1
    row["nats_to_base"] = None if base is None else final - base.figures["valid_loss"]
    if dense is None:
        unknown = dict.fromkeys(("gap", "nats", "dense_share", "hours_to"))
        return {**row, **unknown, "gaps": {}}
    last = dense.figures["valid_loss"]
    losses = {step: loss for step, loss, _ in dense.curve}
    return {
        **row,
        "gaps": {step: loss / losses[step] - 1 for step, loss, _ in run.curve if step in losses},
        "gap": final / last - 1,
        "nats": final - last,
        "dense_share": share_of([(step, loss) for step, loss, _ in dense.curve], final),
        "hours_to": next(
            (hours for _, loss, hours in run.curve if run.alone and loss <= 1.02 * last), None
        ),
    }


def share_of(curve: Sequence[tuple[int, float]], loss: float) -> float:
    """The share of a run's steps after which its validation loss was `loss`."""
    last = curve[-1][0]
    for (before, high), (step, low) in zip(curve, curve[1:], strict=False):
        if low <= loss < high:
            return (before + (step - before) * (high - loss) / (high - low)) / last
    return curve[0][0] / last if loss >= curve[0][1] else 1.0


def mean_of(rows: Sequence[Row], key: str) -> float | None:
    """Over the rows (seeds of a variant); None unless all have the figure."""
    values = [row[key] for row in rows]
    return None if not values or None in values else statistics.fmean(values)


def standard_error(values: Sequence[float]) -> float | None:
    """Of their mean; None: of one alone it is not known."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def with_error(values: Sequence[float], form: str) -> str:
    """The mean, and its standard error where there are several; `form` is the mean's."""
    error = standard_error(values)
    if not values:
        return "-"
    tail = "" if error is None else f" ± {error:{form.lstrip('+')}}"
    return f"{statistics.fmean(values):{form}}{tail}"


def percent(values: Sequence[float]) -> str:
    """The mean of shares in % with its standard error."""
    return with_error([100 * value for value in values], "+.2f")


def nats(values: Sequence[float]) -> str:
    """The mean of differences of losses with its standard error."""
    return with_error(values, "+.4f")


def _known(rows: Sequence[Row], key: str) -> list[float]:
    return [row[key] for row in rows if row[key] is not None]


def _alone(rows: Sequence[Row], key: str) -> float | None:
    """The mean of a figure of time, over the runs that had their device alone."""
    return mean_of([row for row in rows if row["tokens_per_second"] is not None], key)


def _flips(rows: Sequence[Row]) -> str:
    highest, last = mean_of(rows, "flip_rate_highest"), mean_of(rows, "flip_rate_last")
    return "-" if highest is None or last is None else f"{highest:.4f}, {last:.4f}"


def _shown(value: float | None, form: str, scale: float = 1.0) -> str:
    return "-" if value is None else format(scale * value, form)


def heading(title: str, runs: Sequence[Finished], command: str) -> list[str]:
    """What was run, when and on what, of the runs themselves."""
    seeds = sorted({run.seed for run in runs})
    dates = sorted({run.date for run in runs})
    tokens = sorted({run.figures["tokens"] for run in runs})
    return [
        f"# {title}",
        "",
        f"{' to '.join(dict.fromkeys([dates[0], dates[-1]]))}, "
        f"{'; '.join(sorted({run.hardware for run in runs}))}; "
        f"{' or '.join(f'{count:,}' for count in tokens)} tokens a run, seeds "
        f"{', '.join(map(str, seeds))}.",
        "",
        f"    {command}",
        "",
    ]


def table(rows: Sequence[Row], variants: Sequence[str]) -> list[str]:
    """A line a variant; several seeds as mean and standard error of pairs."""
    columns = [
        "variant",
        "seeds",
        "training loss",
        "validation loss",
        "nats to dense",
        "% to dense",
    ]
    columns += ["dense steps to it", "flip rate, highest and last", "tokens/s", "minutes"]
    lines = []
    for variant in variants:
        group = [row for row in rows if row["variant"] == variant]
        if not group:
            continue
        share = _shown(mean_of(group, "dense_share"), ".0f", 100)
        lines.append(
            [
                *_losses(variant, group),
                nats(_known(group, "nats")),
                percent(_known(group, "gap")),
                f"{share} %" if share != "-" else share,
                _flips(group),
                _shown(_alone(group, "tokens_per_second"), ",.0f"),
                _shown(_alone(group, "hours"), ".1f", 60),
                _shown(_alone(group, "hours_to"), ".1f", 60),
            ]
        )
    return markdown_table([*columns, "minutes to 1.02 x dense"], lines)


def _losses(variant: str, group: Sequence[Row]) -> list[str]:
    """The first cells of a variant's line: name, seeds, training and validation loss."""
    losses = (mean_of(group, key) for key in ("training_loss", "valid_loss"))
    return [variant, str(len(group)), *(f"{loss:.4f}" for loss in losses)]


def ablation_table(rows: Sequence[Row], bases: Mapping[str, str]) -> list[str]:
    """A line a variant beside the one that it changes, in pairs of a seed; empty if there is none.

    Args:
        bases: by ablation, in order.
    """
    columns = ["variant", "seeds", "training loss", "validation loss", "changes", "pairs"]
    columns += ["nats to it", "% to it", "% to dense", "flip rate, highest and last", "tokens/s"]
    lines = []
    for variant, base in bases.items():
        group = [row for row in rows if row["variant"] == variant]
        if group:
            lines.append(
                [
                    *_losses(variant, group),
                    base,
                    str(len(_known(group, "gap_to_base"))),
                    nats(_known(group, "nats_to_base")),
                    percent(_known(group, "gap_to_base")),
                    percent(_known(group, "gap")),
                    _flips(group),
                    _shown(_alone(group, "tokens_per_second"), ",.0f"),
                ]
            )
    return ["", "## Beside what they change", "", *markdown_table(columns, lines)] if lines else []


def on_the_way(rows: Sequence[Row], variants: Sequence[str]) -> list[str]:
    """Gaps to dense after each quarter of the run, a line a variant; empty if rarely evaluated."""
    steps = sorted({step for row in rows for step in row["gaps"]})
    if len(steps) < 4:
        return []
    chosen = [steps[len(steps) * part // 4 - 1] for part in (1, 2, 3, 4)]
    lines = []
    for variant in variants:
        group = [row for row in rows if row["variant"] == variant and row["gaps"]]
        if group and variant != "dense":
            cells = [percent([row["gaps"][s] for row in group if s in row["gaps"]]) for s in chosen]
            lines.append([variant, str(len(group)), *cells])
    return [
        "",
        "## On the way",
        "",
        "Validation loss to dense at the same step, in %.",
        "",
        *markdown_table(["variant", "seeds", *(f"step {step}" for step in chosen)], lines),
    ]


def starts(rows: Sequence[Row]) -> list[str]:
    """Each run's gap to dense at its first evaluation beside that at its end, and its highest
    gradient norm: whether what happened in the first steps is what the table compares. Empty
    with fewer than four runs beside dense."""
    known = [(row, row["gaps"][min(row["gaps"])]) for row in rows if len(row["gaps"]) > 1]
    pairs = [(early, row["gap"]) for row, early in known if row["variant"] != "dense"]
    if len(pairs) < 4:
        return []
    lines = []
    for row, early in sorted(known, key=lambda pair: pair[0]["gap"]):
        norm = row.get("grad_norm_highest")
        spike = "-" if norm is None else f"{norm[0]:.1f} ({norm[1]})"
        gaps = [f"{100 * early:+.2f} %", f"{100 * row['gap']:+.2f} %"]
        lines.append([f"{row['variant']}, seed {row['seed']}", spike, *gaps])
    columns = ["run", "highest gradient norm (step)", "to dense, first evaluation", "at the end"]
    return [
        "",
        "## What the start decides",
        "",
        "A gap that is there at the first evaluation and stays tells more of the first steps than "
        "of the recipe. Gaps at the first evaluation and at the end correlate by "
        f"{_correlation(pairs)} over {len(pairs)} runs.",
        "",
        *markdown_table(columns, lines),
    ]


def _correlation(pairs: Sequence[tuple[float, float]]) -> str:
    """Pearson's; where all of one side are equal there is none."""
    try:
        return f"{statistics.correlation(*zip(*pairs, strict=True)):.2f}"
    except statistics.StatisticsError:
        return "-"


def noise(rows: Sequence[Row]) -> list[str]:
    """How far seeds lie apart, and which variants are told apart in spite of it: a paragraph."""
    lines = ["", "## Noise", ""]
    gaps: dict[str, dict[int, float]] = {}
    for row in rows:
        if row["gap"] is not None:
            gaps.setdefault(row["variant"], {})[row["seed"]] = row["gap"]
    ranges = {
        name: max(by_seed.values()) - min(by_seed.values())
        for name, by_seed in gaps.items()
        if name != "dense" and len(by_seed) > 1
    }
    if not ranges:
        return [*lines, "No variant has a gap to dense for two seeds: the noise is not known."]
    widest = max(ranges, key=lambda name: ranges[name])
    dense = [row["valid_loss"] for row in rows if row["variant"] == "dense"]
    lines += [
        "A gap is taken between two runs of one seed, which see the same samples in the same order "
        "and are evaluated on the same samples. Over seeds the range of a variant's gap to dense "
        f"(highest less lowest, {len(ranges)} variants with two seeds or more) is "
        f"{100 * statistics.fmean(ranges.values()):.2f} percentage points on average and at most "
        f"{100 * ranges[widest]:.2f} ({widest}); the validation losses of dense itself lie "
        f"{100 * (max(dense) / min(dense) - 1):.2f} % apart. Two variants are told apart here if "
        "their gaps differ by more, on average over the seeds that both have, than that difference "
        "varies with the seed:",
        "",
    ]
    lower = {name: [other for other in gaps if _lower(gaps[name], gaps[other])] for name in gaps}
    told = [
        f"- {name} is lower than {', '.join(others)}" for name, others in lower.items() if others
    ]
    return [*lines, *(told or ["- none"])]


def _lower(one: Mapping[int, float], other: Mapping[int, float]) -> bool:
    """Whether the gaps (by seed) of one are reliably lower than the other's."""
    differences = [other[seed] - gap for seed, gap in one.items() if seed in other]
    if len(differences) < 2:
        return False
    return statistics.fmean(differences) > max(differences) - min(differences)


def missing_line(missing: Sequence[str]) -> list[str]:
    """What the table does not have yet."""
    return ["", f"Not run yet: {', '.join(missing)}."] if missing else []


def sweep_table(runs: Sequence[tuple[float, Finished]]) -> list[str]:
    """A line a learning rate, the lowest validation loss marked."""
    best = min(runs, key=lambda pair: pair[1].figures["valid_loss"])
    rows = []
    for rate, run in sorted(runs, key=lambda pair: pair[0]):
        losses = [f"{run.figures[key]:.4f}" for key in ("training_loss", "valid_loss")]
        rows.append([f"{rate:g}", *losses, "lowest" if rate == best[0] else ""])
    return markdown_table(["lr", "training loss", "validation loss", ""], rows)
