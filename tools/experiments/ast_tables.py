"""The report of compare_ast.py: from rows to Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from megasparse.cli import markdown_table
from tools.experiments.ast_variants import INT4, RETRAINED, Row


def report(
    scale: str, rows: Sequence[Row], missing: Sequence[str], commands: Sequence[str]
) -> list[str]:
    """The table with hardware, versions, date and commands.

    Args:
        rows: of complete variants, in the table's order.
        missing: variants that are not.
        commands: that made them.
    """
    by_name = {row["variant"]: row for row in rows}
    dense = by_name.get("dense")
    dates = sorted({row["date"] for row in rows})
    first = rows[0]
    lines = [
        f"# AST compared, scale {scale}",
        "",
        f"{' to '.join(dict.fromkeys([dates[0], dates[-1]]))}, "
        f"{'; '.join(sorted({row['hardware'] for row in rows}))}; "
        f"{first['parameters'] / 1e6:.1f}M parameters, all measured in float32 on the same "
        f"{first['tokens_of_evaluation']:,} held-out tokens{_budget(by_name)}.",
        "",
        *(f"    {command}" for command in commands),
        "",
        *markdown_table(
            [
                "variant",
                "tokens of training",
                "loss",
                "perplexity",
                "above dense",
                "linears 2:4",
                "low rank",
            ],
            [_cells(row, dense) for row in rows],
        ),
    ]
    if missing:
        lines += ["", f"Not made yet: {', '.join(missing)}."]
    if INT4 in by_name:
        last = by_name[INT4]
        lines += [
            "",
            f"{INT4}: {last['times_smaller_than_fp32']:.2f} times smaller than the dense model in "
            f"FP32 with everything; the quantized linears alone "
            f"{last['linears_times_smaller_than_fp32']:.2f} times (values, places, scales and "
            "low-rank matrices).",
        ]
    return [*lines, "", *_times(rows)]


def _cells(row: Row, dense: Row | None) -> list[str]:
    gap = "-"
    if dense is not None:
        gap = f"{100 * (row['perplexity'] / dense['perplexity'] - 1):+.1f} %"
    tokens = f"{row['training']['tokens'] / 1e6:.1f}M" if row["training"] else "-"
    low_rank = f"{100 * row['low_rank_share']:.1f} %" if row["low_rank_share"] else "-"
    loss, perplexity = f"{row['loss']:.4f}", f"{row['perplexity']:.3f}"
    sparse = str(row["sparse_layers"] or "-")
    return [row["variant"], tokens, loss, perplexity, gap, sparse, low_rank]


def _budget(rows: dict[str, Row]) -> str:
    """What retraining took of the dense model's tokens."""
    trained = [rows[name]["training"]["tokens"] for name in RETRAINED if name in rows]
    if not trained or "dense" not in rows:
        return ""
    whole = rows["dense"]["training"]["tokens"]
    shares = sorted({f"{100 * tokens / whole:.1f} %" for tokens in trained})
    return f"; retrained with {' or '.join(shares)} of the dense model's {whole / 1e6:.0f}M tokens"


def _times(rows: Sequence[Row]) -> list[str]:
    """Where the time went."""
    columns = ["variant", "training, tokens/s", "training, minutes", "made in", "measured in"]
    cells = []
    for row in rows:
        run, seconds = row["training"], row["seconds"]
        speed = [f"{run['tokens_per_second']:,.0f}", f"{60 * run['hours']:.1f}"] if run else "--"
        spent = [f"{seconds['making']:.0f} s", f"{seconds['measuring']:.0f} s"]
        cells.append([row["variant"], *speed, *spent])
    return [
        "## Time",
        "",
        *markdown_table(columns, cells),
        "",
        "Training: the steps alone. Made: with start and saves, for dense and an interrupted run "
        "only what its process still had to do.",
        "",
    ]
