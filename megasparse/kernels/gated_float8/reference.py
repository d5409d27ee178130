"""The definition of `swiglu_float8`: the operations that it fuses, one after the other."""

from __future__ import annotations

import torch

from megasparse.kernels.float8 import quantise
from megasparse.kernels.gated_activation.reference import forward


def swiglu_float8(
    fused: torch.Tensor,
    scale: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor | None,
    amax: torch.Tensor | None,
) -> None:
    """Fill `rows` and `columns`, raise `amax`."""
    gate, x = fused.chunk(2, dim=1)
    activation = forward(x, gate, False)
    if amax is not None:
        amax.copy_(torch.maximum(amax, activation.float().abs().amax()))
    tokens = fused.shape[0]
    whole = rows.view(torch.uint8)  # torch neither fills nor copies every 8-bit format everywhere
    whole[tokens:] = 0
    whole[:tokens] = quantise(activation, scale, rows.dtype).view(torch.uint8)
    if columns is not None:
        columns.view(torch.uint8).copy_(whole.t())
