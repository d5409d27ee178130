"""Time a kernel under several launch parameters on a GPU: what to set in its `triton.py`.

A candidate is timed only if it gives the result of the parameters that are set now, bit for bit;
otherwise its row says so and the exit code is 1. Shapes and data are those of `kernels`.

    python -m tools.bench.launch_parameters
    python -m tools.bench.launch_parameters --only grad_pack24
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megasparse.cli import markdown_table
from megasparse.kernels.activation_float8 import triton as activation_float8
from megasparse.kernels.activation_grad_pack24 import triton as activation_grad_pack24
from megasparse.kernels.grad_pack24 import triton as grad_pack24
from megasparse.kernels.mvue_pack24 import triton as mvue_pack24
from megasparse.kernels.norm_float8 import triton as norm_float8
from megasparse.kernels.rotary_qkv import triton as rotary_qkv
from tools.bench.kernels import bind, milliseconds, tensors_of
from tools.bench.parts.kernel_cases import Case, Source
from tools.bench.parts.operand_cases import operand_cases

MODULES = {
    "activation_float8": activation_float8,
    "grad_pack24": grad_pack24,
    "mvue_pack24": mvue_pack24,
    "norm_float8": norm_float8,
    "rotary_qkv": rotary_qkv,
    "activation_grad_pack24": activation_grad_pack24,
}


@dataclass(frozen=True)
class Sweep:
    """Candidates of a row of `tools.bench.kernels`.

    Attributes:
        case: begins the row's name.
        module: of the kernel, below megasparse.kernels.
        name: of its launch parameters there.
        candidates: their values, in the order of the dataclass.
    """

    case: str
    module: str
    name: str
    candidates: tuple[tuple[int, ...], ...]


GRADIENT = (
    (16, 4, 80), (16, 4, 96), (16, 4, 112), (16, 4, 128), (8, 2, 80), (8, 2, 96), (8, 4, 64),
    (32, 8, 96), (32, 8, 80), (16, 8, 64),
)  # fmt: skip
# 16, 32 and 64 tokens of 4096 channels.
NORM = (
    (1 << 17, 4096, 8), (1 << 17, 2048, 8), (1 << 17, 2048, 4), (1 << 17, 4096, 16),
    (1 << 17, 8192, 16), (1 << 16, 2048, 8), (1 << 16, 4096, 8), (1 << 16, 2048, 4),
    (1 << 16, 1024, 4), (1 << 18, 4096, 8), (1 << 18, 4096, 16), (1 << 18, 8192, 16),
)  # fmt: skip
SWEEPS = (
    Sweep("grad_pack24 exact bf16, e5m2 rows", "grad_pack24", "LAUNCH", GRADIENT),
    Sweep(
        "activation_grad_pack24", "activation_grad_pack24", "LAUNCH",
        ((8, 4, 128), (8, 4, 112), (8, 4, 96), (8, 4, 80), (8, 4, 168), (16, 8, 128), (16, 8, 96),
         (16, 8, 80), (16, 4, 168), (16, 4, 200), (16, 4, 255), (8, 2, 168), (8, 2, 255)),
    ),
    Sweep(
        "mvue_pack24 exact", "mvue_pack24", "LAUNCH",
        ((16, 4, 64), (16, 4, 56), (16, 4, 80), (32, 8, 64), (32, 8, 80), (32, 4, 96), (32, 4, 80),
         (32, 4, 128), (16, 2, 96), (16, 2, 80), (8, 2, 64), (64, 8, 96)),
    ),
    Sweep(
        "activation_float8", "activation_float8", "LAUNCH",
        ((32, 4), (32, 8), (16, 2), (16, 4), (8, 2), (32, 2)),
    ),
    Sweep(
        "rotary_qkv", "rotary_qkv", "LAUNCH", ((32, 8), (32, 4), (16, 8), (16, 4), (32, 2), (8, 4))
    ),
    Sweep("norm_float8 bf16, RMSNorm", "norm_float8", "LAUNCH", NORM),
)  # fmt: skip


def results(case: Case, device: torch.device) -> list[torch.Tensor]:
    """What the kernel gives, as bytes."""
    source = Source(case.odd_shape, device, torch.Generator(device).manual_seed(1))
    found = tensors_of(case.prepare(bind(case.op, "triton", device), case.inputs(source))())
    return [tensor.contiguous().view(-1).view(torch.uint8) for tensor in found]


def rows(sweep: Sweep, case: Case, device: torch.device) -> tuple[list[str], int]:
    """A table's rows, one a candidate, and how many of them are wrong."""
    module: Any = MODULES[sweep.module]
    set_now, lines, wrong = getattr(module, sweep.name), [], 0
    source = Source(case.shape, device, torch.Generator(device).manual_seed(1))
    step = case.prepare(bind(case.op, "triton", device), case.inputs(source))
    expected = results(case, device)
    try:
        for values in sweep.candidates:
            candidate = type(set_now)(*values)
            setattr(module, sweep.name, candidate)
            pairs = zip(results(case, device), expected, strict=True)
            if all(torch.equal(found, right) for found, right in pairs):
                cell = f"{milliseconds(step):.3f}"
            else:
                wrong, cell = wrong + 1, "another result"
            mark = " (set now)" if candidate == set_now else ""
            lines.append(f"| {case.name} | {candidate}{mark} | {cell} |")
            print(lines[-1], flush=True)
    finally:
        setattr(module, sweep.name, set_now)
    return lines, wrong


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="sweeps of rows whose name begins so")
    options = parser.parse_args(argv)
    wanted = [s for s in SWEEPS if s.case.startswith(options.only or "")]
    if not torch.cuda.is_available() or not wanted:
        what = "no CUDA device" if wanted else f"no sweep is named like {options.only!r}"
        print(f"launch_parameters.py: error: {what}", file=sys.stderr)
        return 2
    device, cases, wrong = torch.device("cuda"), operand_cases(), 0
    print("\n".join(markdown_table(["kernel", "launch", "ms"], [], text_columns=2)))
    for sweep in wanted:
        case = next(case for case in cases if case.name.startswith(sweep.case))
        wrong += rows(sweep, case, device)[1]
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
