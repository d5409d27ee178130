"""What 2:4 activations would take on this GPU: packing and GEMMs of an FFN with squared ReLU.

    python -m tools.bench.activation24 --output tools/results/activation24-h200-2026-01-01.md

An FFN without a gate: z = x W1^T, h = relu(z)^2, y = h W2^T, with T tokens, x (T, D), h (T, F).
If of every four of h's features two are kept (Haziza et al., arXiv 2503.16672), h is the sparse
operand of y = h W2^T, and dz, which has its zeros, that of dx = dz W1: both (T, F) times (F, D).
The tensor cores take one sparse operand, so a 2:4 W1 or W2 gains nothing more in these products.
Unlike a weight, which is packed once a step, h and dz are packed in every micro-batch.

For each shape and format, in ms: "activation" reads (T, F) and writes it, as h is made today;
"pack" reads it and writes its packed form by the kernel that packs weights (`weight_pack24` with
the soft threshold, which finds the two largest of four as well); "compress" is the library's
`torch._cslt_compress`. The GEMMs are the fastest right ones of the library and the dense one.
"packed product": (activation + dense GEMM) / (pack + 2:4 GEMM).

"FFN" is forward and backward in all: six products, two of them 2:4, and what makes their operands.
Weight gradients stay dense and need h and dz dense as well: "pack" then writes a dense transposed
copy beside the packed form. In e4m3 "activation" writes a transposed copy too, for products read
both operands along K there. Nothing else is counted: it is what could be gained at most. Random
data: speed does not depend on them.
"""

from __future__ import annotations

import argparse
import datetime
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from megasparse.atomic_files import write_text
from megasparse.cli import markdown_table
from megasparse.kernels import transpose_float8, weight_pack24
from megasparse.kernels.packed24 import E4M3
from megasparse.sparsity.gemms.choice import milliseconds
from tools.bench import gemms

# (T, D, F).
SHAPES = [(8192, 2048, 8192), (16384, 2048, 8192), (4096, 4096, 14336), (16384, 4096, 14336)]
REPEATS = 10


@dataclass(frozen=True)
class Row:
    """One shape and format, milliseconds.

    Attributes:
        activation, pack: (T, F) to itself, and to its packed form.
        activation_both, pack_both: with what weight gradients read.
        compress: the library's packing.
        dense, sparse: (T, F) times (F, D).
        wide: the dense product (T, D) times (D, F): z, and the gradient of h.
        weights: the dense product of a weight gradient.
    """

    name: str
    activation: float
    activation_both: float
    pack: float
    pack_both: float
    compress: float
    dense: float
    sparse: float
    wide: float
    weights: float

    @property
    def product(self) -> float:
        """How many times faster a product with its packing is."""
        return (self.activation + self.dense) / (self.pack + self.sparse)

    @property
    def ffn(self) -> float:
        """How many times faster forward and backward of the whole FFN could be."""
        same = 2 * self.wide + 2 * self.weights
        dense = same + 2 * (self.activation_both + self.dense)
        return dense / (same + 2 * (self.pack_both + self.sparse))


def measure(shape: tuple[int, int, int], dtype: torch.dtype) -> Row:
    """All times of one shape and format (bfloat16 or e4m3)."""
    tokens, hidden, ffn = shape
    device = torch.device("cuda", 0)
    z = torch.randn(tokens, ffn, device=device, dtype=torch.bfloat16)
    one = torch.ones((), device=device)
    error_flag, nan_flag = torch.zeros(2, 1, dtype=torch.int32, device=device)
    scale = one if dtype == E4M3 else None

    def packing(transposed: Literal["dense"] | None) -> Callable[[], object]:
        pack = partial(
            weight_pack24,
            z,
            threshold_scale=one,
            dtype=dtype,
            scale=scale,
            transposed=transposed,
            error_flag=error_flag,
            nan_flag=nan_flag,
        )
        return partial(pack, out=pack())

    h = torch.empty(tokens, ffn, dtype=dtype, device=device)

    def activation_both() -> None:
        h.copy_(z)
        if dtype == E4M3:
            transpose_float8(h)

    half = torch.where(torch.arange(ffn, device=device) % 4 < 2, z, torch.zeros_like(z)).to(dtype)
    product = gemms.measure((tokens, ffn, hidden), True, dtype)
    name = f"{str(dtype).removeprefix('torch.')} | {tokens}, {hidden}, {ffn}"
    return Row(
        name=name,
        activation=milliseconds(lambda: h.copy_(z), REPEATS),
        activation_both=milliseconds(activation_both, REPEATS),
        pack=milliseconds(packing(None), REPEATS),
        pack_both=milliseconds(packing("dense"), REPEATS),
        compress=milliseconds(lambda: torch._cslt_compress(half), REPEATS),
        dense=product.dense,
        sparse=product.times[product.best],
        wide=milliseconds(dense_product(tokens, hidden, ffn, dtype), REPEATS),
        weights=milliseconds(dense_product(ffn, tokens, hidden, dtype), REPEATS),
    )


def dense_product(n: int, k: int, m: int, dtype: torch.dtype) -> Callable[[], object]:
    """(N, K) times (K, M), both read along K."""
    device, bf16 = torch.device("cuda", 0), torch.bfloat16
    a = torch.randn(n, k, device=device, dtype=bf16).to(dtype)
    b = torch.randn(m, k, device=device, dtype=bf16).to(dtype)
    one = torch.ones((), device=device)
    if dtype == bf16:
        return lambda: a @ b.t()
    return lambda: torch._scaled_mm(a, b.t(), one, one, out_dtype=bf16, use_fast_accum=True)


def report(rows: Sequence[Row], where: str, argv: Sequence[str]) -> str:
    """The table in markdown."""
    cells = [
        [
            *row.name.split(" | "),
            *(
                f"{ms:.3f}"
                for ms in (row.activation, row.pack, row.compress, row.dense, row.sparse)
            ),
            f"{row.dense / row.sparse:.2f}",
            f"{row.product:.2f}",
            f"{row.ffn:.2f}",
        ]
        for row in rows
    ]
    columns = ["format", "T, D, F", "activation", "pack", "compress", "dense GEMM", "2:4 GEMM"]
    lines = [
        f"# 2:4 activations of squared ReLU on {where}",
        "",
        f"{datetime.date.today()}, torch {torch.__version__}. Command: "
        f"`{shlex.join(['python', '-m', 'tools.bench.activation24', *argv])}`",
        "",
        "Milliseconds, and times faster.",
        "",
        *markdown_table([*columns, "GEMM alone", "packed product", "FFN"], cells, text_columns=2),
    ]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="markdown file to write")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("activation24.py: error: no GPU is here", file=sys.stderr)
        return 1
    rows: list[Row] = []
    for dtype in (torch.bfloat16, E4M3):
        for shape in SHAPES:
            rows.append(measure(shape, dtype))
            print(rows[-1].name, file=sys.stderr, flush=True)
    text = report(rows, torch.cuda.get_device_name(), argv)
    print(text)
    if args.output:
        write_text(args.output, text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
