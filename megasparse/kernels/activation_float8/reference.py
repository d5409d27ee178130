"""The definition of `activation_float8`: the operations that it fuses, one after the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megasparse.kernels.activation.kinds import Activation
from megasparse.kernels.activation.reference import forward_fused
from megasparse.kernels.float8 import operands, transposed_blocks
from megasparse.kernels.weighted_activation.reference import weighted_activation


def activation_float8(
    fused: torch.Tensor,
    scale: torch.Tensor,
    activation: Activation,
    transposed: bool,
    strided: bool = False,
    weights: torch.Tensor | None = None,
    counts: Sequence[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """The operands (T', F) and (F, T') or None, and the activation's largest magnitude, 0-d."""
    if weights is None:
        y = forward_fused(fused, activation)
    else:
        y = weighted_activation(fused, weights, activation)
    if counts is None:
        return operands(y, scale, transposed, strided)
    rows, _, found = operands(y, scale, False)
    return rows, transposed_blocks(rows, counts) if transposed else None, found
