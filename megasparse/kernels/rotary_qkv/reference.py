"""The definition of `rotary_qkv`, in plain torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from megasparse.kernels.factors import NOTHING, Lacking, given

if TYPE_CHECKING:
    from megasparse.kernels.rotary_qkv import Heads


def forward(
    fused: torch.Tensor, angles: torch.Tensor, heads: Heads, factors: Lacking = NOTHING
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q (S, B, groups * queries, D), k and v (S, B, groups, D) of `fused` (S, B, width).

    angles: float32 (S', D).
    """
    q, k, v = split(given(fused, factors), heads)
    v = v.clone(memory_format=torch.contiguous_format)
    return _turned(q, angles, 1.0), _turned(k, angles, 1.0), v


def split(fused: torch.Tensor, heads: Heads) -> tuple[torch.Tensor, ...]:
    """q, k and v as they lie in `fused`."""
    length, batch, _ = fused.shape
    groups, queries, channels = heads
    parts = fused.reshape(length, batch, groups, queries + 2, channels).split([queries, 1, 1], 3)
    return tuple(part.reshape(length, batch, -1, channels) for part in parts)


def backward(
    dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, angles: torch.Tensor | None, heads: Heads
) -> torch.Tensor:
    """The gradient of `fused` (S, B, width): q's and k's turned back, in their places."""
    length, batch = dq.shape[:2]
    parts = (dq, dk, dv)
    if angles is not None:
        parts = (_turned(dq, angles, -1.0), _turned(dk, angles, -1.0), dv)
    whole = [part.reshape(length, batch, heads.groups, -1, heads.channels) for part in parts]
    return torch.cat(whole, 3).reshape(length, batch, heads.width)


def _turned(x: torch.Tensor, angles: torch.Tensor, sign: float) -> torch.Tensor:
    """x (S, B, heads, D), channels i and i + D/2 of each head turned by `sign` * angle."""
    half = angles[: x.shape[0], : x.shape[3] // 2].view(x.shape[0], 1, 1, -1)
    cos, sin = half.cos(), half.sin() * sign
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype).contiguous()
