"""The definition of `swiglu_float8`: the operations that it fuses, one after the other."""

from __future__ import annotations

import torch

from megasparse.kernels.float8 import fill_operands
from megasparse.kernels.swiglu.reference import forward


def swiglu_float8(
    fused: torch.Tensor,
    scale: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor | None,
    amax: torch.Tensor | None,
) -> None:
    """Fill `rows` and `columns`, raise `amax`."""
    gate, x = fused.chunk(2, dim=1)
    fill_operands(forward(x, gate, False), scale, rows, columns, amax)
