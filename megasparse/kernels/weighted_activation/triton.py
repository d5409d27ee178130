"""Triton kernels of the weighted activation: one pass forward, one pass backward.

Backward a program takes a row, whose weight's gradient is a sum over all its channels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megasparse.kernels.activation.kinds import Activation, is_gated
from megasparse.kernels.activation.triton import gated, grad_gate
from megasparse.kernels.device.groups import rounded, widen
from megasparse.kernels.dispatch import INTERPRETING
from megasparse.kernels.launches import KINDS

# Channels at a time, and channels of a program forward.
CHANNELS, ENTRIES = 1024, 4096


@triton.jit
def _rounded(x, KIND: tl.constexpr):
    return tl.where(x == x, rounded(x, KIND), x)


@triton.jit
def _load(ptrs, width, live, GATED: tl.constexpr):
    """The gate, and what it is multiplied with, at `ptrs`, which point to gates."""
    gate = widen(tl.load(ptrs, mask=live, other=0.0))
    if GATED:
        return gate, widen(tl.load(ptrs + width, mask=live, other=0.0))
    else:
        return gate, tl.full(gate.shape, 1.0, tl.float32)


@triton.jit
def _weighted_forward_kernel(
    fused_ptr,
    weights_ptr,
    out_ptr,
    num_rows,
    width,
    GATED: tl.constexpr,
    GELU: tl.constexpr,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    blocks = tl.cdiv(width, CHANNELS)
    pid = tl.program_id(0)
    row = (pid // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    channel = (pid % blocks) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    live = (row < num_rows) & (channel < width)
    width = tl.cast(width, tl.int64)
    PARTS: tl.constexpr = 2 if GATED else 1
    gate, x = _load(fused_ptr + row * (PARTS * width) + channel, width, live, GATED)
    weight = widen(tl.load(weights_ptr + row, mask=row < num_rows, other=0.0))
    y = _rounded(_rounded(gated(x, gate, GELU), KIND) * weight, KIND)
    tl.store(out_ptr + row * width + channel, y.to(out_ptr.dtype.element_ty), mask=live)


@triton.jit
def _weighted_backward_kernel(
    dy_ptr,
    fused_ptr,
    weights_ptr,
    dfused_ptr,
    dweights_ptr,
    width,
    GATED: tl.constexpr,
    GELU: tl.constexpr,
    KIND: tl.constexpr,
    WEIGHT_KIND: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    width = tl.cast(width, tl.int64)
    PARTS: tl.constexpr = 2 if GATED else 1
    weight = widen(tl.load(weights_ptr + row))
    fused_ptr += row * (PARTS * width)
    dfused_ptr += row * (PARTS * width)
    total = tl.zeros((CHANNELS,), tl.float32)
    for first in range(0, width, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        live = channel < width
        dy = widen(tl.load(dy_ptr + row * width + channel, mask=live, other=0.0))
        gate, x = _load(fused_ptr + channel, width, live, GATED)
        total += dy * _rounded(gated(x, gate, GELU), KIND)
        dy = _rounded(dy * weight, KIND)
        dgate = _rounded(grad_gate(dy, x, gate, GELU), KIND)
        tl.store(dfused_ptr + channel, dgate.to(dfused_ptr.dtype.element_ty), mask=live)
        if GATED:
            dx = _rounded(gated(dy, gate, GELU), KIND)
            tl.store(dfused_ptr + width + channel, dx.to(dfused_ptr.dtype.element_ty), mask=live)
    found = _rounded(tl.sum(total, 0), WEIGHT_KIND)
    tl.store(dweights_ptr + row, found.to(dweights_ptr.dtype.element_ty))


def weighted_activation(
    fused: torch.Tensor, weights: torch.Tensor, activation: Activation
) -> torch.Tensor:
    """See reference.py."""
    fused, weights = fused.contiguous(), weights.contiguous()
    rows, width = fused.shape[0], fused.shape[1] // (1 + is_gated(activation))
    out = fused.new_empty(rows, width)
    if out.numel():
        channels = min(triton.next_power_of_2(width), CHANNELS)
        at_a_time = (1 << 16 if INTERPRETING else ENTRIES) // channels
        _weighted_forward_kernel[(triton.cdiv(rows, at_a_time) * triton.cdiv(width, channels),)](
            fused,
            weights,
            out,
            rows,
            width,
            GATED=is_gated(activation),
            GELU=activation != "swiglu",
            KIND=KINDS[fused.dtype],
            ROWS=at_a_time,
            CHANNELS=channels,
            num_warps=8,
        )
    return out


def weighted_activation_backward(
    dy: torch.Tensor, fused: torch.Tensor, weights: torch.Tensor, activation: Activation
) -> tuple[torch.Tensor, torch.Tensor]:
    """See reference.py."""
    dy, fused, weights = dy.contiguous(), fused.contiguous(), weights.contiguous()
    rows, width = dy.shape
    dfused, dweights = torch.empty_like(fused), torch.empty_like(weights)
    if rows:
        _weighted_backward_kernel[(rows,)](
            dy,
            fused,
            weights,
            dfused,
            dweights,
            width,
            GATED=is_gated(activation),
            GELU=activation != "swiglu",
            KIND=KINDS[fused.dtype],
            WEIGHT_KIND=KINDS[weights.dtype],
            CHANNELS=min(triton.next_power_of_2(max(width, 1)), CHANNELS),
            num_warps=4,
        )
    return dfused, dweights
