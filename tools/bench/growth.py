"""Growth laws of what `tools.bench.ranks` has measured, before and after a change, as a table.

python -m tools.bench.growth before.json after.json --output TABLE.md
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megasparse.atomic_files import write_text

FIT_FROM = 32  # ranks: below, constants hide the growth
FAR = 16_384
# Phase, quantity, its words, whether the law may be carried to a cluster.
ROWS = (
    ("meet", "cpu_seconds", "meeting and world group: CPU s of all ranks", True),
    ("meet", "bytes", "meeting and world group: bytes", True),
    ("control", "seconds", "control plane: s", False),
    ("control", "cpu_seconds", "control plane: CPU s of all ranks", True),
    ("control", "packets", "control plane: packets", True),
    ("control", "bytes", "control plane: bytes", True),
    ("agree", "seconds", "a decision: s", False),
    ("agree", "packets", "a decision: packets", True),
    ("save", "seconds", "a save: s", False),
    ("save", "cpu_seconds", "a save: CPU s of all ranks", True),
    ("save", "packets", "a save: packets", True),
    ("save", "bytes", "a save: bytes", True),
    ("save", "manifest_bytes", "manifest (8 tensors a rank): bytes", True),
    ("choose", "seconds", "verify and agree at a resume: s", False),
    ("choose", "cpu_seconds", "verify and agree: CPU s of all ranks", True),
    ("choose", "packets", "verify and agree: packets", True),
    ("choose", "bytes", "verify and agree: bytes", True),
    ("choose", "opened", "verify and agree: files opened", True),
    ("load", "seconds", "read the own part: s", False),
    ("load", "cpu_seconds", "read the own part: CPU s of all ranks", True),
    ("load", "opened", "read the own part: files opened", True),
    ("reshard", "seconds", "read another layout's part: s", False),
    ("reshard", "cpu_seconds", "read another layout's part: CPU s of all ranks", True),
    ("reshard", "packets", "read another layout's part: packets", True),
    ("reshard", "bytes", "read another layout's part: bytes", True),
    ("reshard", "opened", "read another layout's part: files opened", True),
    ("load", "files_rank_0", "open files of rank 0", True),
    ("load", "files_rank_1", "open files of rank 1", True),
    ("watch", "cpu_seconds", "watchdog, set-up: CPU s of all ranks", True),
    ("watch", "packets", "watchdog, set-up: packets", True),
    ("watch", "files_rank_0", "open files of rank 0 with it", True),
    ("beat", "cpu_seconds", "heartbeats: CPU s of all ranks a second", True),
    ("beat", "cpu_seconds_rank_0", "heartbeats: CPU s of rank 0 a second", True),
    ("beat", "packets", "heartbeats: packets a second, on loopback of hosts too", True),
    ("restart", "seconds", "failure after 2 s, and restart: s", False),
    ("restart", "cpu_seconds", "supervisors, the same: CPU s of all", True),
    ("restart", "opened", "supervisors, the same: shared files opened", True),
)


def law(points: dict[int, float]) -> tuple[float, float] | None:
    """a and p of `a N^p` by least squares in logarithms; None without growth to speak of.

    Args:
        points: value by number of ranks.
    """
    logs = [(math.log(n), math.log(v)) for n, v in points.items() if n >= FIT_FROM and v > 0]
    if len(logs) < 2:
        return None
    mean_x, mean_y = (sum(column) / len(logs) for column in zip(*logs, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in logs)
    power = sum((x - mean_x) * (y - mean_y) for x, y in logs) / spread
    return math.exp(mean_y - power * mean_x), power


def line(points: dict[int, float]) -> float:
    """The value at FAR on the straight line through the last two points."""
    (few, low), (many, high) = sorted(points.items())[-2:]
    return high + (high - low) / (many - few) * (FAR - many)


def report(before: dict[str, Any], after: dict[str, Any], command: str) -> str:
    """The table in Markdown."""
    sizes = sorted(set(map(int, before["ranks"])) & set(map(int, after["ranks"])))
    lines = [
        "# The control side over many ranks, before and after",
        "",
        f"`{command}`",
        "",
        f"{after['date']}, {after['hardware']}, torch {after['torch']}, Python {after['python']}; "
        "N forked ranks on loopback, without a model.",
        f"Before (commit {before['commit']}) | after ({after['commit']}). p is the power of N, "
        f"fitted from {FIT_FROM} ranks on.",
        f"The last column is the law at {FAR:,} ranks: **extrapolated**, and only for what does "
        "not depend on the few cores that all ranks share here.",
        "",
        f"| | {' | '.join(map(str, sizes))} | p | at {FAR:,} |",
        f"|---|{'---|' * (len(sizes) + 2)}",
    ]
    for phase, quantity, words, carries in ROWS:
        columns = [
            {n: run["ranks"][str(n)].get(phase, {}).get(quantity) for n in sizes}
            for run in (before, after)
        ]
        if None in columns[1].values():
            continue
        if None in columns[0].values():  # measured only since
            columns[0] = {}
        laws = [law({n: float(v) for n, v in column.items()}) for column in columns]
        cells = [
            " \\| ".join(_short(column[n]) if column else "-" for column in columns) for n in sizes
        ]
        powers = " \\| ".join("-" if found is None else f"{found[1]:.2f}" for found in laws)
        far = " \\| ".join(
            "-" if found is None or not carries else _short(found[0] * FAR ** found[1])
            for found in laws
        )
        if quantity == "files_rank_0":  # a constant and a line: a power would say too little
            far = " \\| ".join(_short(line(column)) if column else "-" for column in columns)
        lines.append(f"| {words} | {' | '.join(cells)} | {powers} | {far} |")
    return "\n".join([*lines, ""])


def _short(value: float) -> str:
    """Three digits, with a unit of thousands."""
    if value == 0 or (value == int(value) and value < 1000):
        return f"{value:.0f}"
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value:.2g}"


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path, help="JSON file of tools.bench.ranks")
    parser.add_argument("after", type=Path)
    parser.add_argument("--output", type=Path, required=True, help="markdown file")
    args = parser.parse_args(argv)
    before, after = (json.loads(path.read_text()) for path in (args.before, args.after))
    command = " ".join(["python -m tools.bench.growth", *argv])
    write_text(args.output, report(before, after, command))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
