"""Triton kernel of `activation_float8`: the projection is read once, coalesced along channels.

A program takes 64 channels by 4 * GROUPS tokens. A thread holds eight channels of groups of four
tokens: it writes eight bytes of the row-major copy at a time, and what moves between threads for
the transposed copy are words of four tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from megasparse.kernels.activation.kinds import Activation, is_gated
from megasparse.kernels.activation.triton import gated
from megasparse.kernels.device.float8 import (
    largest_of_four,
    product_factor,
    raise_amax,
    store_operands,
    words_of_part,
)
from megasparse.kernels.device.groups import first_token, rounded_pair, widen
from megasparse.kernels.dispatch import INTERPRETING
from megasparse.kernels.factors import Lacking
from megasparse.kernels.float8 import new_operands
from megasparse.kernels.mvue24.triton_tile import groups_of_parts, parts_of_tiles


@dataclass(frozen=True)
class Launch:
    """Most groups of 4 tokens a program handles, 64 channels each, and its warps."""

    groups: int
    num_warps: int


LAUNCH = Launch(groups=32, num_warps=4)
# The interpreter costs time per program, not per element.
INTERPRETED = Launch(groups=64, num_warps=4)


@triton.jit
def _activation(ptrs, width, token, num_tokens, factor, GATED: tl.constexpr, GELU: tl.constexpr):
    """act(gate) * x in float32 at `ptrs`, which point to the gates; 0 after the last token."""
    live = token < num_tokens
    gate = widen(tl.load(ptrs, mask=live, other=0.0)) * factor
    if GATED:
        x = widen(tl.load(ptrs + width, mask=live, other=0.0)) * factor
        return gated(x, gate, GELU)
    else:
        return gated(1.0, gate, GELU)


@triton.jit
def _weighted_pair(low, high, weights_ptr, token, step, num_tokens, KIND: tl.constexpr):
    """Two tokens' activations, `step` apart, rounded, times their weights, rounded again."""
    low, high = rounded_pair(low, high, KIND)
    if weights_ptr is None:
        return low, high
    else:
        low *= tl.load(weights_ptr + token, mask=token < num_tokens, other=0.0)
        token += step
        high *= tl.load(weights_ptr + token, mask=token < num_tokens, other=0.0)
        return rounded_pair(low, high, KIND)


@triton.jit
def _activation_float8_kernel(
    fused_ptr,
    weights_ptr,
    parts_ptr,
    rows_ptr,
    columns_ptr,
    scale_ptr,
    amax_ptr,
    a_ptr,
    b_ptr,
    applied_inv,
    num_tokens,
    padded_tokens,
    width,
    stride,
    GATED: tl.constexpr,
    GELU: tl.constexpr,
    STRIDED: tl.constexpr,
    GROUPS: tl.constexpr,
):
    blocks = width // 64
    pid = tl.program_id(0)
    tile, block = pid // blocks, pid % blocks
    group = tile * GROUPS + tl.arange(0, GROUPS)[:, None]
    channel = block * 64 + tl.arange(0, 64)[None, :]
    token = first_token(group, STRIDED)
    step = padded_tokens // 4 if STRIDED else 1
    stride, width = tl.cast(stride, tl.int64), tl.cast(width, tl.int64)
    scale = tl.load(scale_ptr)
    factor = product_factor(a_ptr, b_ptr, applied_inv)
    KIND: tl.constexpr = "bf16" if fused_ptr.dtype.element_ty == tl.bfloat16 else "fp16"
    ptrs = fused_ptr + token * stride + channel
    stride = stride * step
    y0 = _activation(ptrs, width, token, num_tokens, factor, GATED, GELU)
    y1 = _activation(ptrs + stride, width, token + step, num_tokens, factor, GATED, GELU)
    y2 = _activation(ptrs + 2 * stride, width, token + 2 * step, num_tokens, factor, GATED, GELU)
    y3 = _activation(ptrs + 3 * stride, width, token + 3 * step, num_tokens, factor, GATED, GELU)
    y0, y1 = _weighted_pair(y0, y1, weights_ptr, token, step, num_tokens, KIND)
    token += 2 * step
    y2, y3 = _weighted_pair(y2, y3, weights_ptr, token, step, num_tokens, KIND)
    if amax_ptr is not None:
        raise_amax(amax_ptr, largest_of_four(y0, y1, y2, y3))
    if parts_ptr is not None:
        columns_ptr, padded_tokens = words_of_part(columns_ptr, parts_ptr, tile, width)
    store_operands(
        y0 * scale,
        y1 * scale,
        y2 * scale,
        y3 * scale,
        rows_ptr,
        columns_ptr,
        tile * GROUPS,
        block * 64,
        width,
        padded_tokens,
        STRIDED,
        GROUPS,
        64,
    )


def activation_float8(
    fused: torch.Tensor,
    scale: torch.Tensor,
    activation: Activation,
    transposed: bool,
    strided: bool,
    amax: torch.Tensor | None,
    factors: Lacking,
    weights: torch.Tensor | None,
    counts: Sequence[int] | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See reference.py; raises `amax`."""
    if fused.stride(1) != 1:
        fused = fused.contiguous()
    width = fused.shape[1] // (1 + is_gated(activation))
    rows, columns = new_operands(fused.shape[0], width, transposed, fused.device)
    launch = INTERPRETED if INTERPRETING else LAUNCH
    padded, parts = rows.shape[0], None
    groups = groups_of_parts(counts or [padded], launch.groups)
    if columns is not None and counts is not None:
        columns, parts = columns.view(-1), parts_of_tiles(counts, 4 * groups, fused.device)
    with torch.cuda.device_of(fused):  # Triton launches on the current device
        _activation_float8_kernel[((width // 64) * (padded // (4 * groups)),)](
            fused,
            None if weights is None else weights.contiguous(),
            parts,
            rows.view(torch.int8),
            None if columns is None else columns.view(torch.int32),
            scale,
            None if amax is None else amax.view(torch.int32),
            *factors,
            fused.shape[0],
            padded,
            width,
            fused.stride(0),
            GATED=is_gated(activation),
            GELU=activation != "swiglu",
            STRIDED=strided,
            GROUPS=groups,
            num_warps=launch.num_warps,
        )
    return rows, columns
