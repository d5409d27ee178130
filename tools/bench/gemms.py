"""2:4 GEMMs of a layer's shapes beside dense ones: every algorithm of cuSPARSELt, BF16 and FP8.

    python -m tools.bench.gemms --output tools/results/gemms-h200-2026-01-01.md
    python -m tools.bench.gemms --json algorithms.json       (every algorithm's time)

Shapes are those of a Llama-3-8B layer with 16384 tokens: (N, K, M) of a sparse (N, K) times a
dense (K, M); "rows": the result is written row by row (weight gradients), "columns": column by
column (outputs, input gradients). Each algorithm's result is compared with the dense product.
Random data, operands packed by our kernels; time of 10 products back to back.
"""

from __future__ import annotations

import argparse
import datetime
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megasparse.atomic_files import write_json, write_text
from megasparse.cli import markdown_table
from megasparse.kernels import pack24, prune24_mask
from megasparse.kernels.packed24 import E4M3
from megasparse.kernels.spmm24.binding import Plan, Problem
from megasparse.sparsity.gemms.choice import milliseconds

TOKENS, HIDDEN, FFN, QKV = 16384, 4096, 14336, 6144
# (N, K, M), and whether the result is row-major.
SHAPES = [
    ((2 * FFN, HIDDEN, TOKENS), False),
    ((HIDDEN, FFN, TOKENS), False),
    ((FFN, HIDDEN, TOKENS), False),
    ((HIDDEN, 2 * FFN, TOKENS), False),
    ((QKV, HIDDEN, TOKENS), False),
    ((HIDDEN, HIDDEN, TOKENS), False),
    ((HIDDEN, QKV, TOKENS), False),
    ((2 * FFN, TOKENS, HIDDEN), True),
    ((HIDDEN, TOKENS, FFN), True),
    ((QKV, TOKENS, HIDDEN), True),
    ((HIDDEN, TOKENS, HIDDEN), True),
]
ALGORITHMS, FINALISTS, MAX_ERROR = 64, 4, 1e-2


@dataclass
class Row:
    """One shape and format: milliseconds by algorithm, rejected ones, and the dense product's."""

    name: str
    flops: int
    times: dict[int, float]
    rejected: int
    dense: float

    @property
    def best(self) -> int:
        return min(self.times, key=lambda a: self.times[a])


def measure(shape: tuple[int, int, int], rows: bool, dtype: torch.dtype) -> Row:
    """Every algorithm of the library on one problem."""
    n, k, m = shape
    device, bf16 = torch.device("cuda", 0), torch.bfloat16
    w = torch.randn(n, k, device=device, dtype=bf16)
    w = torch.where(prune24_mask(w), w, torch.zeros_like(w)).to(dtype)
    # The weight gradient's dense operand is x (K, M) itself in 16 bits, transposed in 8.
    b_rows = rows and dtype == bf16
    b = torch.randn((k, m) if b_rows else (m, k), device=device, dtype=bf16).to(dtype)
    buffer = pack24(w).buffer
    out = torch.empty((n, m) if rows else (m, n), device=device, dtype=bf16)
    one = torch.ones((), device=device)

    def dense() -> torch.Tensor:
        if dtype == bf16:
            return w @ b if b_rows else b @ w.t()
        left, right = (w, b) if rows else (b, w)
        return torch._scaled_mm(left, right.t(), one, one, out_dtype=bf16, use_fast_accum=True)

    expected, times, rejected = dense().float(), dict[int, float](), 0
    plans: dict[int, Plan] = {}
    for algorithm in range(ALGORITHMS):
        try:
            plan = Plan(Problem(n, k, m, dtype, dtype, bf16, b_rows, rows, algorithm), device)
            plan.run(buffer, b, out, 1.0)
        except RuntimeError:
            continue  # the library has no such algorithm
        error = float((out.float() - expected).norm() / expected.norm())
        if not error < MAX_ERROR:
            rejected += 1
            continue
        plans[algorithm] = plan
        times[algorithm] = milliseconds(lambda p=plan: p.run(buffer, b, out, 1.0), 2)  # type: ignore
    for algorithm in sorted(times, key=lambda a: times[a])[:FINALISTS]:
        plan = plans[algorithm]
        times[algorithm] = milliseconds(lambda p=plan: p.run(buffer, b, out, 1.0), 10)  # type: ignore
    where = "rows" if rows else "columns"
    name = f"{str(dtype).removeprefix('torch.')} | {n}, {k}, {m} | {where}"
    return Row(name, 2 * n * k * m, times, rejected, milliseconds(dense, 10))


def report(rows: Sequence[Row], argv: Sequence[str]) -> str:
    """The table in markdown; TFLOP/s are those of the dense product."""
    lines = [
        f"# 2:4 GEMMs on {torch.cuda.get_device_name()}",
        "",
        f"{datetime.date.today()}, torch {torch.__version__}, cuSPARSELt "
        f"{torch.backends.cusparselt.version()}. Command: "
        f"`{shlex.join(['python', '-m', 'tools.bench.gemms', *argv])}`",
        "",
    ]
    cells = []
    for row in rows:
        if not row.times:
            speed = ["none", row.rejected, "-", "-", f"{row.dense:.3f}", "-"]
        else:
            ms = row.times[row.best]
            speed = [
                f"{row.best}, {len(row.times)}",
                row.rejected,
                f"{ms:.3f}",
                f"{row.flops / ms / 1e9:.0f}",
                f"{row.dense:.3f}",
                f"{row.dense / ms:.2f}",
            ]
        cells.append([*row.name.split(" | "), *speed])
    columns = ["format", "N, K, M", "written by", "algorithm, of", "wrong", "2:4 ms", "TFLOP/s"]
    lines += markdown_table([*columns, "dense ms", "times faster"], cells, text_columns=4)
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="markdown file to write")
    parser.add_argument("--json", type=Path, help="file for the times of all algorithms")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("gemms.py: error: no GPU is here", file=sys.stderr)
        return 1
    rows: list[Row] = []
    for dtype in (torch.bfloat16, E4M3):
        for shape, by_rows in SHAPES:
            rows.append(measure(shape, by_rows, dtype))
            print(rows[-1].name, file=sys.stderr, flush=True)
            if args.json:
                write_json(args.json, {row.name: row.times for row in rows}, indent=1)
    text = report(rows, argv)
    print(text)
    if args.output:
        write_text(args.output, text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
