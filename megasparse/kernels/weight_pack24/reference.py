"""The definition of `weight_pack24`: the operations that it fuses, one after the other."""

from __future__ import annotations

import torch

from megasparse.kernels.float8 import quantise
from megasparse.kernels.pack24.reference import pack
from megasparse.kernels.packed24 import Packed24
from megasparse.kernels.soft_threshold24.reference import soft_threshold24


def effective_weight(
    w: torch.Tensor, mask: torch.Tensor | None, threshold_scale: torch.Tensor | None
) -> torch.Tensor:
    """W~ (N, K) in float32: `W o M`, or `beta * S(W)` with S rounded to w's dtype (S-STE)."""
    if mask is not None:
        return torch.where(mask, w.float(), 0.0)
    assert threshold_scale is not None
    return soft_threshold24(w).float() * threshold_scale


def _check_mask(mask: torch.Tensor, both: bool, flag: torch.Tensor) -> None:
    """Set `flag` to 1 when a group along the rows, or with `both` the columns, keeps over two."""
    for m in (mask, mask.t()) if both else (mask,):
        flag.bitwise_or_((m.reshape(m.shape[0], -1, 4).sum(-1) > 2).any().int())


def weight_pack24(
    w: torch.Tensor,
    mask: torch.Tensor | None,
    threshold_scale: torch.Tensor | None,
    scale: torch.Tensor | None,
    packed: Packed24,
    other: Packed24 | torch.Tensor | None,
    amax: torch.Tensor | None,
    flag: torch.Tensor,
) -> None:
    """Fill `packed` (with its scale) and, if it is there, `other`: W~^T packed or dense."""
    if mask is not None:
        _check_mask(mask, isinstance(other, Packed24), flag)
    effective = effective_weight(w, mask, threshold_scale)
    if amax is not None:
        amax.copy_(torch.maximum(amax, effective.abs().amax()))
    if scale is None:
        converted = effective.to(packed.dtype)
        packed.scale.fill_(1.0)
    else:
        converted = quantise(effective, scale, packed.dtype)
        packed.scale.copy_(scale.reciprocal())
    ignored = torch.zeros_like(flag)  # the mask has been looked at
    pack(converted, packed, False, ignored)
    bits = torch.int16 if packed.dtype.itemsize == 2 else torch.int8
    transposed = converted.view(bits).t().contiguous().view(packed.dtype)
    if isinstance(other, Packed24):
        pack(transposed, other, False, ignored)
    elif other is not None:
        other.copy_(transposed)
