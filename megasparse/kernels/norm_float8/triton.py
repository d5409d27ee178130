"""Triton kernel of `norm_float8`: x comes from memory once.

A program takes all channels of 4 * GROUPS tokens and goes over them CHANNELS at a time: for the
mean (LayerNorm), for the variance, and for the result. So few tokens a program that what all
programs have in hand lies in the L2 cache (and much of it in L1: the last pass goes backwards and
begins with what was read last), yet enough that a channel's tokens are 32 bytes of the transposed
copy.

As in `activation_float8`, a thread holds some channels of groups of four tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from megasparse.kernels.device.float8 import largest_of_four, raise_amax, store_operands
from megasparse.kernels.device.groups import first_token, rounded_pair, widen
from megasparse.kernels.dispatch import INTERPRETING
from megasparse.kernels.float8 import new_operands, whole_tiles


@dataclass(frozen=True)
class Launch:
    """Entries of x that a program has in hand at most (in groups of 4 tokens, `most_groups` of
    them at most), groups times channels that it takes at a time at most, and its warps."""

    entries: int
    elements: int
    num_warps: int
    most_groups: int = 32


# 256 KiB of x (32 tokens of 4096 channels); a thread has sixteen entries of each of four tokens at
# a time (the fastest of tools.bench.launch_parameters on an H200, by little).
LAUNCH = Launch(entries=1 << 17, elements=4096, num_warps=8)
# Of `norm_amax`: nothing is transposed, so that few tokens a program will do.
AMAX_LAUNCH = Launch(entries=1 << 15, elements=4096, num_warps=8)
# The interpreter costs time per program, not per element.
INTERPRETED = Launch(entries=1 << 22, elements=1 << 16, num_warps=4)


@triton.jit
def _load_four(ptrs, stride, token, step, num_tokens, POLICY: tl.constexpr):
    """Four tokens, `step` apart, at `ptrs`, the first's, in float32; 0 after the last token.

    stride: from each to the next.
    """
    a = tl.load(ptrs, mask=token < num_tokens, other=0.0, eviction_policy=POLICY)
    ptrs += stride
    b = tl.load(ptrs, mask=token + step < num_tokens, other=0.0, eviction_policy=POLICY)
    ptrs += stride
    c = tl.load(ptrs, mask=token + 2 * step < num_tokens, other=0.0, eviction_policy=POLICY)
    ptrs += stride
    d = tl.load(ptrs, mask=token + 3 * step < num_tokens, other=0.0, eviction_policy=POLICY)
    return widen(a), widen(b), widen(c), widen(d)


@triton.jit
def _means(
    ptrs,
    stride,
    token,
    step,
    num_tokens,
    width,
    m0,
    m1,
    m2,
    m3,
    SQUARED: tl.constexpr,
    GROUPS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Means over the channels of x, or of (x - m)^2, of the four tokens of each group."""
    s0 = tl.zeros((GROUPS, CHANNELS), tl.float32)
    s1, s2, s3 = s0, s0, s0
    for first in range(0, width, CHANNELS):
        a, b, c, d = _load_four(ptrs + first, stride, token, step, num_tokens, "evict_last")
        if SQUARED:
            a, b, c, d = a - m0, b - m1, c - m2, d - m3
            a, b, c, d = a * a, b * b, c * c, d * d
        s0 += a
        s1 += b
        s2 += c
        s3 += d
    s0, s1 = tl.sum(s0, 1, keep_dims=True) / width, tl.sum(s1, 1, keep_dims=True) / width
    s2, s3 = tl.sum(s2, 1, keep_dims=True) / width, tl.sum(s3, 1, keep_dims=True) / width
    return s0, s1, s2, s3


@triton.jit
def _store_four(ptr, token, step, num_tokens, a, b, c, d):
    """A statistic of the four tokens of each group."""
    tl.store(ptr + token, a, mask=token < num_tokens)
    token += step
    tl.store(ptr + token, b, mask=token < num_tokens)
    token += step
    tl.store(ptr + token, c, mask=token < num_tokens)
    token += step
    tl.store(ptr + token, d, mask=token < num_tokens)


@triton.jit
def _affine(x, mean, rstd, weight, bias_ptr, channel, live):
    """The norm's value in float32; 0 after the last token."""
    y = (x - mean) * rstd * weight
    if bias_ptr is not None:
        y += widen(tl.load(bias_ptr + channel))
    return tl.where(live, y, 0.0)


@triton.jit
def _norm_float8_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    rows_ptr,
    columns_ptr,
    mean_ptr,
    rstd_ptr,
    scale_ptr,
    amax_ptr,
    num_tokens,
    padded_tokens,
    width,
    stride,
    eps,
    STRIDED: tl.constexpr,
    GROUPS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    first_group = tl.program_id(0) * GROUPS
    token = first_token(first_group + tl.arange(0, GROUPS)[:, None], STRIDED)
    step = padded_tokens // 4 if STRIDED else 1
    lane = tl.arange(0, CHANNELS)[None, :]
    # Parameters are loaded by every thread as it needs them, not shared out through shared memory.
    all_lanes = tl.broadcast_to(lane, (GROUPS, CHANNELS))
    stride = tl.cast(stride, tl.int64)
    scale = 1.0
    if rows_ptr is not None:
        scale = tl.load(scale_ptr)
    KIND: tl.constexpr = "bf16" if x_ptr.dtype.element_ty == tl.bfloat16 else "fp16"
    ptrs = x_ptr + token * stride + lane
    stride = stride * step
    m0 = tl.zeros((GROUPS, 1), tl.float32)
    m1, m2, m3 = m0, m0, m0
    if mean_ptr is not None:
        m0, m1, m2, m3 = _means(
            ptrs, stride, token, step, num_tokens, width, m0, m1, m2, m3, False, GROUPS, CHANNELS
        )
        _store_four(mean_ptr, token, step, num_tokens, m0, m1, m2, m3)
    r0, r1, r2, r3 = _means(
        ptrs, stride, token, step, num_tokens, width, m0, m1, m2, m3, True, GROUPS, CHANNELS
    )
    r0, r1 = 1.0 / tl.sqrt_rn(r0 + eps), 1.0 / tl.sqrt_rn(r1 + eps)
    r2, r3 = 1.0 / tl.sqrt_rn(r2 + eps), 1.0 / tl.sqrt_rn(r3 + eps)
    _store_four(rstd_ptr, token, step, num_tokens, r0, r1, r2, r3)
    largest = tl.zeros((GROUPS, CHANNELS), tl.float32)
    for done in range(0, width, CHANNELS):
        first = width - CHANNELS - done
        channel = first + all_lanes
        weight = widen(tl.load(weight_ptr + channel))
        a, b, c, d = _load_four(ptrs + first, stride, token, step, num_tokens, "evict_first")
        a = _affine(a, m0, r0, weight, bias_ptr, channel, token < num_tokens)
        b = _affine(b, m1, r1, weight, bias_ptr, channel, token + step < num_tokens)
        c = _affine(c, m2, r2, weight, bias_ptr, channel, token + 2 * step < num_tokens)
        d = _affine(d, m3, r3, weight, bias_ptr, channel, token + 3 * step < num_tokens)
        a, b = rounded_pair(a, b, KIND)
        c, d = rounded_pair(c, d, KIND)
        if amax_ptr is not None:
            found = largest_of_four(a, b, c, d)
            largest = tl.maximum(largest, found, propagate_nan=tl.PropagateNan.ALL)
        if rows_ptr is not None:
            store_operands(
                a * scale,
                b * scale,
                c * scale,
                d * scale,
                rows_ptr,
                columns_ptr,
                first_group,
                first,
                tl.cast(width, tl.int64),
                padded_tokens,
                STRIDED,
                GROUPS,
                CHANNELS,
            )
    if amax_ptr is not None:
        raise_amax(amax_ptr, largest)


def norm_float8(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    centred: bool,
    eps: float,
    scale: torch.Tensor,
    transposed: bool,
    strided: bool,
    amax: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
    """See reference.py; raises `amax`."""
    rows, columns = new_operands(x.shape[0], x.shape[1], transposed, x.device)
    statistics = _run(LAUNCH, x, weight, bias, centred, eps, rows, columns, scale, strided, amax)
    return rows, columns, *statistics


def norm_amax(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, centred: bool, eps: float
) -> torch.Tensor:
    """See reference.py."""
    amax = torch.zeros(1, dtype=torch.float32, device=x.device)
    _run(AMAX_LAUNCH, x, weight, bias, centred, eps, None, None, None, False, amax)
    return amax


def _run(
    launch: Launch,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    centred: bool,
    eps: float,
    rows: torch.Tensor | None,
    columns: torch.Tensor | None,
    scale: torch.Tensor | None,
    strided: bool,
    amax: torch.Tensor | None,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Fill `rows` and `columns`, and raise `amax`, of those that are there; mean and rstd."""
    if x.stride(1) != 1:
        x = x.contiguous()
    rstd = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    mean = torch.empty_like(rstd) if centred else None
    padded, width = whole_tiles(x.shape[0]), x.shape[1]
    groups, channels, num_warps = _tile(padded, width, INTERPRETED if INTERPRETING else launch)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _norm_float8_kernel[(padded // (4 * groups),)](
            x,
            weight.contiguous(),
            None if bias is None else bias.contiguous(),
            None if rows is None else rows.view(torch.int8),
            None if columns is None else columns.view(torch.int32),
            mean,
            rstd,
            scale,
            None if amax is None else amax.view(torch.int32),
            x.shape[0],
            padded,
            width,
            x.stride(0),
            float(eps),
            STRIDED=strided,
            GROUPS=groups,
            CHANNELS=channels,
            num_warps=num_warps,
        )
    return mean, rstd


def _tile(padded: int, width: int, launch: Launch) -> tuple[int, int, int]:
    """Groups and channels at a time, powers of two that divide all there are; warps."""
    groups = 1
    while groups < launch.most_groups and 8 * groups * width <= launch.entries:
        groups *= 2
    channels = width & -width
    while channels > 64 and groups * channels > launch.elements:
        channels //= 2
    return groups, channels, launch.num_warps
