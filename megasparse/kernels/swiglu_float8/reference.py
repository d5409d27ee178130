"""The definition of `swiglu_float8`: the operations that it fuses, one after the other."""

from __future__ import annotations

import torch

from megasparse.kernels.float8 import operands
from megasparse.kernels.swiglu.reference import forward


def swiglu_float8(
    fused: torch.Tensor, scale: torch.Tensor, transposed: bool, strided: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """The operands (T', F) and (F, T') or None, and the activation's largest magnitude, 0-d."""
    gate, x = fused.chunk(2, dim=1)
    return operands(forward(x, gate, False), scale, transposed, strided)
