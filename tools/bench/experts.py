"""From how many tokens per expert on 2:4 GEMMs of experts pay: beside dense ones, BF16 and FP8.

    python -m tools.bench.experts --output tools/results/experts-h200-2026-01-01.md
    python -m tools.bench.experts --experts 64 --hidden 2048 --width 1024 --tokens 128 512 2048

The products of a layer's experts, each with the same number of tokens: `fc1` and `fc2` forward
(output; grad_input is of the same kind), and fc1's weight gradient with a draw that is packed
already. Dense: one grouped GEMM of torch (`grouped_mm`, in FP8 `_scaled_grouped_mm`) or one GEMM an
expert, the faster of the two. 2:4: cuSPARSELt's product of each expert, one after the other or on 4
streams, by the fastest of the library's algorithms that gives the dense result. Random data,
operands packed by our kernels; times of 9 products of all experts back to back. What makes the
operands is not in these times: weights are packed once a step.
"""

from __future__ import annotations

import argparse
import datetime
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megasparse.atomic_files import write_text
from megasparse.cli import markdown_table
from megasparse.fp8.scale import Scale
from megasparse.kernels import pack24, prune24_mask
from megasparse.kernels.packed24 import E4M3
from megasparse.sparsity.gemms.choice import MAX_ERROR, milliseconds
from megasparse.sparsity.gemms.expert_products import (
    Streams,
    each_product,
    each_sum,
    scaled_products,
    scaled_sums,
    side_streams,
)
from megasparse.sparsity.gemms.expert_tokens import ExpertTokens
from megasparse.sparsity.gemms.experts import DenseExpertGemms

ALGORITHMS, FINALISTS = 64, 3
GEMMS = ("fc1 output", "fc2 output", "fc1 grad_weight")
TOKENS = [128, 256, 512, 1024, 2048, 4096, 8192]


@dataclass(frozen=True)
class Row:
    """One GEMM of all experts.

    Attributes:
        tokens: of an expert.
        grouped, looped: milliseconds of the dense product.
        alone, together: of 2:4 products, one after the other and on streams; infinite: none is
            right.
        algorithm: the fastest of the library's.
    """

    dtype: str
    gemm: str
    tokens: int
    grouped: float
    looped: float
    alone: float
    together: float
    algorithm: int

    @property
    def gain(self) -> float:
        """How many times faster 2:4 is than dense, both as they are fastest."""
        return min(self.grouped, self.looped) / min(self.alone, self.together)


def measure(gemm: str, dtype: torch.dtype, sizes: tuple[int, int, int], tokens: int) -> Row:
    """One GEMM of `(experts, hidden, width)`."""
    experts, hidden, width = sizes
    n, k = (hidden, width) if gemm.startswith("fc2") else (2 * width, hidden)
    counts = [tokens] * experts
    if gemm.endswith("grad_weight"):
        sparse, dense = _sums(dtype, counts, n, k)
    else:
        sparse, dense = _products(dtype, counts, n, k)
    expected = dense(True).float()
    error = (dense(False).float() - expected).norm() / expected.norm()
    if not float(error) < MAX_ERROR:
        raise RuntimeError(f"{gemm}: grouped and single dense GEMMs differ by {float(error):.3f}")
    times = dict[int, float]()
    for algorithm in range(ALGORITHMS):
        try:
            result = sparse(algorithm, ())
        except RuntimeError:
            continue  # the library has no such algorithm
        error = (result.float() - expected).norm() / expected.norm()
        if float(error) < MAX_ERROR:
            times[algorithm] = milliseconds(lambda a=algorithm: sparse(a, ()), 1)  # type: ignore
    streams = side_streams(torch.device("cuda", torch.cuda.current_device()))
    best, alone, together = -1, float("inf"), float("inf")
    for algorithm in sorted(times, key=lambda a: times[a])[:FINALISTS]:
        one = milliseconds(lambda a=algorithm: sparse(a, ()), 9)  # type: ignore[misc]
        beside = milliseconds(lambda a=algorithm: sparse(a, streams), 9)  # type: ignore[misc]
        if min(one, beside) < min(alone, together):
            best, alone, together = algorithm, one, beside
    grouped, looped = milliseconds(lambda: dense(True), 9), milliseconds(lambda: dense(False), 9)
    kind = "FP8" if dtype == E4M3 else "BF16"
    return Row(kind, gemm, tokens, grouped, looped, alone, together, best)


Sparse = Callable[[int, Streams], torch.Tensor]
Dense = Callable[[bool], torch.Tensor]


def _products(dtype: torch.dtype, counts: list[int], n: int, k: int) -> tuple[Sparse, Dense]:
    """`x_e W_e^T`, by 2:4 and by dense GEMMs."""
    w, x = _pruned((len(counts) * n, k)), _random((sum(counts), k)).to(dtype)
    w_ENK = w.to(dtype).view(-1, n, k)
    packed = [pack24(one) for one in w_ENK]

    def dense(grouped: bool) -> torch.Tensor:
        if dtype == E4M3:
            return scaled_products(x, w_ENK, counts, *_one(), grouped)
        return DenseExpertGemms(len(counts), grouped, w).output(x, ExpertTokens(counts))

    return lambda a, streams: each_product(packed, x, counts, a, streams, _alpha(dtype)), dense


def _sums(dtype: torch.dtype, counts: list[int], n: int, k: int) -> tuple[Sparse, Dense]:
    """`dz_e^T x_e` with dz^T 2:4 along tokens."""
    dz_NT = _pruned((n, sum(counts))).to(dtype)
    packed = [pack24(one.contiguous()) for one in dz_NT.split(counts, 1)]
    x_TK = _random((sum(counts), k))
    b = x_TK.t().contiguous().to(dtype) if dtype == E4M3 else x_TK
    dz_TN = dz_NT.t().contiguous() if dtype != E4M3 else dz_NT

    def dense(grouped: bool) -> torch.Tensor:
        if dtype == E4M3:
            return scaled_sums(dz_NT, b, counts, *_one(), grouped)
        gemms = DenseExpertGemms(len(counts), grouped)
        operands = gemms.prepare_grad_output(dz_TN, ExpertTokens(counts), 0)
        return gemms.grad_weight(operands, (b,)).view(len(counts), n, k)

    # As a run has them: transposed expert by expert.
    each = [part.contiguous() for part in b.split(counts, 1 if dtype == E4M3 else 0)]

    def sparse(algorithm: int, streams: Streams) -> torch.Tensor:
        return each_sum(packed, each, counts, algorithm, streams, dtype == E4M3, _alpha(dtype))

    return sparse, dense


def _random(shape: tuple[int, int]) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def _pruned(shape: tuple[int, int]) -> torch.Tensor:
    w = _random(shape)
    return torch.where(prune24_mask(w), w, torch.zeros_like(w))


def _one() -> tuple[Scale, Scale]:
    one = torch.ones((), device="cuda")
    return Scale(one, one), Scale(one, one)


def _alpha(dtype: torch.dtype) -> float | None:
    return 1.0 if dtype == E4M3 else None


def pays_from(rows: Sequence[Row]) -> int | None:
    """The fewest tokens from which on 2:4 is faster than dense in all rows of one GEMM."""
    found = None
    for row in sorted(rows, key=lambda row: -row.tokens):
        if row.gain <= 1.0:
            break
        found = row.tokens
    return found


def report(rows: Sequence[Row], sizes: tuple[int, int, int], how: Sequence[str]) -> str:
    """The tables in markdown.

    Args:
        how: lines on GPU, versions and command.
    """
    experts, hidden, width = sizes
    lines = [
        f"# 2:4 GEMMs of {experts} experts, hidden size {hidden}, width {width}",
        "",
        *how,
        "",
        "Milliseconds of all experts; the last column: 2:4 to dense, both as they are fastest.",
        "",
    ]
    columns = [
        "format",
        "GEMM",
        "tokens per expert",
        "grouped",
        "one by one",
        "2:4",
        "on 4 streams",
    ]
    cells = [
        [
            row.dtype,
            row.gemm,
            row.tokens,
            *(f"{ms:.3f}" for ms in (row.grouped, row.looped, row.alone, row.together)),
            f"{row.gain:.2f}",
        ]
        for row in rows
    ]
    lines += markdown_table([*columns, "times faster"], cells, text_columns=2)
    lines += ["", "2:4 pays from so many tokens per expert on:", ""]
    kinds = dict.fromkeys((row.dtype, row.gemm) for row in rows)
    cells = []
    for kind in kinds:
        found = pays_from([row for row in rows if (row.dtype, row.gemm) == kind])
        cells.append([*kind, "none of these" if found is None else found])
    lines += markdown_table(["format", "GEMM", "tokens per expert"], cells, text_columns=2)
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experts", type=int, default=8, help="of a layer on a GPU")
    parser.add_argument("--hidden", type=int, default=2048, help="hidden size")
    parser.add_argument("--width", type=int, default=4096, help="of an expert")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="of an expert")
    parser.add_argument("--output", type=Path, help="markdown file to write")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("experts.py: error: no GPU is here", file=sys.stderr)
        return 1
    sizes = (args.experts, args.hidden, args.width)
    how = [
        f"{datetime.date.today()}, {torch.cuda.get_device_name()}, torch {torch.__version__}, "
        f"cuSPARSELt {torch.backends.cusparselt.version()}. Command: "
        f"`{shlex.join(['python', '-m', 'tools.bench.experts', *argv])}`"
    ]
    rows: list[Row] = []
    text = ""
    for dtype in (torch.bfloat16, E4M3):
        for gemm in GEMMS:
            for tokens in args.tokens:
                rows.append(measure(gemm, dtype, sizes, tokens))
                print(_line(rows[-1]), file=sys.stderr, flush=True)
                text = report(rows, sizes, how)
                if args.output:  # what was measured is kept, should a later one fail
                    write_text(args.output, text)
    print(text)
    return 0


def _line(row: Row) -> str:
    fields: dict[str, Any] = vars(row)
    return ", ".join(str(value) for value in fields.values())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
