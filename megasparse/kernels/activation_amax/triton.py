"""Triton kernel of `activation_amax` and `activation_grad_amax`: one pass that reads alone.

Rounding keeps the order of magnitudes, so the largest of a program's columns are rounded alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megasparse.kernels.activation.kinds import Activation, is_gated
from megasparse.kernels.activation.triton import gated, grad_gate
from megasparse.kernels.device.float8 import product_factor, raise_amax
from megasparse.kernels.device.groups import rounded, widen
from megasparse.kernels.dispatch import INTERPRETING
from megasparse.kernels.factors import NOTHING, Lacking
from megasparse.kernels.launches import KINDS, Tile

# 12 to 16 loads of 16 bytes a thread.
FORWARD = Tile(rows=8, columns=1024, num_warps=4)
BACKWARD = Tile(rows=4, columns=1024, num_warps=4)
# The interpreter costs time per program, not per element.
INTERPRETED = Tile(rows=128, columns=512, num_warps=4)


@triton.jit
def _magnitude(
    fused_ptrs, dy_ptrs, width, live, factor, dy_factor, GATED: tl.constexpr, GELU: tl.constexpr
):
    """Bits of the activation's magnitude, or with dy of the larger of its two gradients."""
    gate = widen(tl.load(fused_ptrs, mask=live, other=0.0)) * factor
    x = 1.0
    if GATED:
        x = widen(tl.load(fused_ptrs + width, mask=live, other=0.0)) * factor
    if dy_ptrs is None:
        return gated(x, gate, GELU).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    else:
        dy = widen(tl.load(dy_ptrs, mask=live, other=0.0)) * dy_factor
        bits = grad_gate(dy, x, gate, GELU).to(tl.int32, bitcast=True) & 0x7FFFFFFF
        if GATED:
            of_x = gated(dy, gate, GELU).to(tl.int32, bitcast=True) & 0x7FFFFFFF
            bits = tl.maximum(bits, of_x)
        return bits


@triton.jit
def _activation_amax_kernel(
    fused_ptr,
    dy_ptr,
    amax_ptr,
    a_ptr,
    b_ptr,
    applied_inv,
    dy_a_ptr,
    dy_b_ptr,
    dy_applied_inv,
    num_rows,
    width,
    stride,
    dy_stride,
    GATED: tl.constexpr,
    GELU: tl.constexpr,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tiles = tl.cdiv(width, COLUMNS)
    pid = tl.program_id(0)
    row = (pid // tiles) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (pid % tiles) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    live = (row < num_rows) & (column < width)
    fused = fused_ptr + row.to(tl.int64) * stride + column
    dy = None
    if dy_ptr is not None:
        dy = dy_ptr + row.to(tl.int64) * dy_stride + column
    factor = product_factor(a_ptr, b_ptr, applied_inv)
    dy_factor = product_factor(dy_a_ptr, dy_b_ptr, dy_applied_inv)
    # Bits are ordered like magnitudes, NaN above all.
    largest = tl.max(_magnitude(fused, dy, width, live, factor, dy_factor, GATED, GELU), 0)
    value = largest.to(tl.float32, bitcast=True)
    raise_amax(amax_ptr, tl.where(value == value, rounded(value, KIND), value))


def activation_amax(fused: torch.Tensor, activation: Activation, factors: Lacking) -> torch.Tensor:
    """See reference.py."""
    return _largest(FORWARD, None, fused, activation, NOTHING, factors)


def activation_grad_amax(
    dy: torch.Tensor,
    fused: torch.Tensor,
    activation: Activation,
    dy_factors: Lacking,
    factors: Lacking,
) -> torch.Tensor:
    """See reference.py."""
    return _largest(BACKWARD, dy, fused, activation, dy_factors, factors)


def _largest(
    tile: Tile,
    dy: torch.Tensor | None,
    fused: torch.Tensor,
    activation: Activation,
    dy_factors: Lacking,
    factors: Lacking,
) -> torch.Tensor:
    fused = fused if fused.stride(1) == 1 else fused.contiguous()
    dy = dy if dy is None or dy.stride(1) == 1 else dy.contiguous()
    tokens, width = fused.shape[0], fused.shape[1] // (1 + is_gated(activation))
    tile = INTERPRETED if INTERPRETING else tile
    amax = torch.zeros(1, dtype=torch.float32, device=fused.device)
    _activation_amax_kernel[(triton.cdiv(tokens, tile.rows) * triton.cdiv(width, tile.columns),)](
        fused,
        dy,
        amax.view(torch.int32),
        *factors,
        *dy_factors,
        tokens,
        width,
        fused.stride(0),
        0 if dy is None else dy.stride(0),
        GATED=is_gated(activation),
        GELU=activation != "swiglu",
        KIND=KINDS[fused.dtype],
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        num_warps=tile.num_warps,
        enable_fp_fusion=False,
    )
    return amax
