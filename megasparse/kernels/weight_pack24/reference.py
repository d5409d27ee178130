"""The definition of `weight_pack24`: the operations that it fuses, one after the other."""

from __future__ import annotations

import torch

from megasparse.kernels.float8 import quantize
from megasparse.kernels.pack24.reference import pack24
from megasparse.kernels.packed24 import Packed24
from megasparse.kernels.prune24.reference import prune24
from megasparse.kernels.soft_threshold24.reference import soft_threshold24


def effective_weight(
    w: torch.Tensor, mask: torch.Tensor | None, threshold_scale: torch.Tensor | None
) -> torch.Tensor:
    """W~ (N, K) in float32: `W o M`, or `beta * S(W)` with S rounded to w's dtype (S-STE)."""
    if mask is not None:
        return torch.where(mask, w.float(), 0.0)
    assert threshold_scale is not None
    if threshold_scale.dim():  # of weights that are stacked
        rows = w.shape[0] // len(threshold_scale)
        threshold_scale = threshold_scale.repeat_interleave(rows).unsqueeze(1)
    return soft_threshold24(w).float() * threshold_scale


def weight_pack24(
    w: torch.Tensor,
    mask: torch.Tensor | None,
    threshold_scale: torch.Tensor | None,
    dtype: torch.dtype,
    scale: torch.Tensor | None,
    transposed: str | None,
) -> tuple[Packed24, Packed24 | torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """W~ packed, W~^T as `transposed` asks, the largest |W~|, whether the mask is not 2:4 (0-d).

    "double-pruned": of each four of W~, as it was rounded, along N the two largest stay.
    """
    effective = effective_weight(w, mask, threshold_scale)
    if scale is None:
        converted, scale_inv = effective.to(dtype), torch.ones((), device=w.device)
    else:
        converted, scale_inv = quantize(effective, scale, dtype), scale.reciprocal()
    packed, _ = pack24(converted, dtype, scale_inv)
    other: Packed24 | torch.Tensor | None = None
    if transposed is not None:
        bits = torch.int16 if dtype.itemsize == 2 else torch.int8
        other = converted.view(bits).t().contiguous().view(dtype)
        if transposed == "double-pruned":
            other = torch.where(prune24(other), other.view(bits), 0).view(dtype)
        if transposed != "dense":
            other = pack24(other, dtype, scale_inv)[0]
    return packed, other, effective.abs().amax(), _crowded(mask, w, transposed == "packed")


def _crowded(mask: torch.Tensor | None, w: torch.Tensor, both: bool) -> torch.Tensor:
    """0-d bool: a group of the mask along the rows, or with `both` the columns, keeps over two."""
    if mask is None:
        return torch.zeros((), dtype=torch.bool, device=w.device)
    masks = (mask, mask.t()) if both else (mask,)
    counts = [m.reshape(m.shape[0], -1, 4).sum(-1).amax() for m in masks]
    return torch.stack(counts).amax() > 2
