"""The definition of `activation_float8`: the operations that it fuses, one after the other."""

from __future__ import annotations

import torch

from megasparse.kernels.activation.kinds import Activation
from megasparse.kernels.activation.reference import forward_fused
from megasparse.kernels.float8 import operands


def activation_float8(
    fused: torch.Tensor,
    scale: torch.Tensor,
    activation: Activation,
    transposed: bool,
    strided: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """The operands (T', F) and (F, T') or None, and the activation's largest magnitude, 0-d."""
    return operands(forward_fused(fused, activation), scale, transposed, strided)
