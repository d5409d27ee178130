"""The definition of `rotary_qkv`, in plain torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from megasparse.kernels.rotary_qkv import Heads


def rotate(
    fused: torch.Tensor,
    parts: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    angles: torch.Tensor,
    heads: Heads,
    forward: bool,
) -> None:
    """Fill q, k and v from `fused`, turned forward, or `fused` from them, turned back.

    Args:
        fused: (S, B, width), contiguous.
        parts: q (S, B, groups * queries, D), k and v (S, B, groups, D), contiguous.
        angles: float32 (S', D).
    """
    groups, queries, channels = heads
    length, batch, _ = fused.shape
    whole = fused.view(length, batch, groups, queries + 2, channels)
    q, k, v = (part.view(length, batch, groups, -1, channels) for part in parts)
    half = angles[:length, : channels // 2].view(length, 1, 1, 1, -1)
    cos, sin = half.cos(), half.sin()
    slots = whole[..., :queries, :], whole[..., queries : queries + 1, :]
    for inside, outside in zip(slots, (q, k), strict=True):
        source, target, turn = (inside, outside, sin) if forward else (outside, inside, -sin)
        a, b = source.float().chunk(2, dim=-1)
        target.copy_(torch.cat([a * cos - b * turn, b * cos + a * turn], dim=-1))
    values = whole[..., queries + 1 :, :]
    if forward:
        v.copy_(values)
    else:
        values.copy_(v)
