"""Triton kernel of `rotary_qkv`: a program takes a position, in all sequences and heads.

So the sines and cosines of a position are computed once; all else is reading and writing. Heads
are rows of tiles whose columns are the two halves of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from megasparse.kernels.device.float8 import product_factor
from megasparse.kernels.device.groups import rounded, widen
from megasparse.kernels.factors import NOTHING, Lacking
from megasparse.kernels.launches import KINDS

if TYPE_CHECKING:
    from megasparse.kernels.rotary_qkv import Heads


@dataclass(frozen=True)
class Launch:
    """Heads that a program takes at a time at most, and its warps."""

    rows: int
    num_warps: int


# 16 elements a thread of each half of 32 heads of 128 channels: two loads of 16 bytes.
LAUNCH = Launch(rows=32, num_warps=4)


@triton.jit
def _move(source, target, half, live, factor, SCALED: tl.constexpr, KIND: tl.constexpr):
    """Copy both halves of heads, times a factor."""
    a, b = tl.load(source, mask=live), tl.load(source + half, mask=live)
    if SCALED:
        a, b = widen(a) * factor, widen(b) * factor
        a, b = tl.where(a == a, rounded(a, KIND), a), tl.where(b == b, rounded(b, KIND), b)
        a, b = a.to(target.dtype.element_ty), b.to(target.dtype.element_ty)
    tl.store(target, a, mask=live)
    tl.store(target + half, b, mask=live)


@triton.jit
def _turn(source, target, half, cos, sin, live, factor, TURNS: tl.constexpr, KIND: tl.constexpr):
    """Copy both halves of heads, turned, times a factor."""
    if TURNS:
        a = widen(tl.load(source, mask=live, other=0.0)) * factor
        b = widen(tl.load(source + half, mask=live, other=0.0)) * factor
        first, second = a * cos - b * sin, b * cos + a * sin
        first = tl.where(first == first, rounded(first, KIND), first)
        second = tl.where(second == second, rounded(second, KIND), second)
        tl.store(target, first.to(target.dtype.element_ty), mask=live)
        tl.store(target + half, second.to(target.dtype.element_ty), mask=live)
    else:
        _move(source, target, half, live, factor, False, KIND)


@triton.jit
def _rotary_qkv_kernel(
    fused_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    angles_ptr,
    a_ptr,
    b_ptr,
    applied_inv,
    batch,
    groups,
    HALF: tl.constexpr,
    COLUMNS: tl.constexpr,
    QUERIES: tl.constexpr,
    QUERY_ROWS: tl.constexpr,
    KEY_ROWS: tl.constexpr,
    FORWARD: tl.constexpr,
    TURNS: tl.constexpr,
    KIND: tl.constexpr,
):
    position = tl.program_id(0)
    column = tl.arange(0, COLUMNS)[None, :]
    inside = column < HALF
    factor = product_factor(a_ptr, b_ptr, applied_inv)
    SCALED: tl.constexpr = a_ptr is not None
    cos, sin = 1.0, 0.0
    if TURNS:
        angle = tl.load(angles_ptr + position * (2 * HALF) + column, mask=inside, other=0.0)
        cos, sin = tl.cos(angle), tl.sin(angle)
        if not FORWARD:
            sin = -sin
    WIDTH: tl.constexpr = 2 * HALF
    heads = groups * QUERIES
    for sequence in range(0, batch):
        place = position.to(tl.int64) * batch + sequence
        fused = fused_ptr + place * groups * ((QUERIES + 2) * WIDTH) + column
        for first in range(0, heads, QUERY_ROWS):
            head = first + tl.arange(0, QUERY_ROWS)[:, None]
            live = (head < heads) & inside
            in_fused = fused + (head + (head // QUERIES) * 2) * WIDTH
            own = q_ptr + (place * heads + head) * WIDTH + column
            if FORWARD:
                _turn(in_fused, own, HALF, cos, sin, live, factor, TURNS, KIND)
            else:
                _turn(own, in_fused, HALF, cos, sin, live, factor, TURNS, KIND)
        for first in range(0, groups, KEY_ROWS):
            group = first + tl.arange(0, KEY_ROWS)[:, None]
            live = (group < groups) & inside
            in_fused = fused + (group * (QUERIES + 2) + QUERIES) * WIDTH
            own = (place * groups + group) * WIDTH + column
            if FORWARD:
                _turn(in_fused, k_ptr + own, HALF, cos, sin, live, factor, TURNS, KIND)
                _move(in_fused + WIDTH, v_ptr + own, HALF, live, factor, SCALED, KIND)
            else:
                _turn(k_ptr + own, in_fused, HALF, cos, sin, live, factor, TURNS, KIND)
                _move(v_ptr + own, in_fused + WIDTH, HALF, live, factor, SCALED, KIND)


def forward(
    fused: torch.Tensor, angles: torch.Tensor, heads: Heads, factors: Lacking = NOTHING
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See reference.py."""
    fused = fused.contiguous()
    shape = (*fused.shape[:2], heads.groups * heads.queries, heads.channels)
    q = torch.empty(shape, dtype=fused.dtype, device=fused.device)
    shape = (*fused.shape[:2], heads.groups, heads.channels)
    k, v = (torch.empty(shape, dtype=fused.dtype, device=fused.device) for _ in range(2))
    _rotate(fused, (q, k, v), angles, heads, True, factors)
    return q, k, v


def backward(
    dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, angles: torch.Tensor | None, heads: Heads
) -> torch.Tensor:
    """See reference.py."""
    parts = dq.contiguous(), dk.contiguous(), dv.contiguous()
    dfused = torch.empty((*dq.shape[:2], heads.width), dtype=dq.dtype, device=dq.device)
    _rotate(dfused, parts, angles, heads, False)
    return dfused


def _rotate(
    fused: torch.Tensor,
    parts: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    angles: torch.Tensor | None,
    heads: Heads,
    forward: bool,
    factors: Lacking = NOTHING,
) -> None:
    """Fill q, k and v from `fused`, turned forward, or `fused` from them, turned back."""
    groups, queries, channels = heads
    if fused.numel() == 0:
        return
    with torch.cuda.device_of(fused):  # Triton launches on the current device
        _rotary_qkv_kernel[(fused.shape[0],)](
            fused,
            *parts,
            fused if angles is None else angles,
            *factors,
            fused.shape[1],
            groups,
            HALF=channels // 2,
            COLUMNS=triton.next_power_of_2(channels // 2),
            QUERIES=queries,
            QUERY_ROWS=min(triton.next_power_of_2(groups * queries), LAUNCH.rows),
            KEY_ROWS=min(triton.next_power_of_2(groups), LAUNCH.rows),
            FORWARD=forward,
            TURNS=angles is not None,
            KIND=KINDS[fused.dtype],
            num_warps=LAUNCH.num_warps,
            enable_fp_fusion=False,
        )
