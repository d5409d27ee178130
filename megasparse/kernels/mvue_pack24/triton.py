"""Triton kernel of `mvue_pack24`: dZ is read once, coalesced along channels, and leaves packed.

A program takes 64 channels (the height of a metadata block) by 4 * GROUPS tokens. Groups of four
tokens are four rows in registers, as in `mvue24`; what is kept, two values in one 32-bit word and a
4-bit code, is transposed on its way out: half of the bytes that came in.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from megasparse.kernels.dispatch import INTERPRETING
from megasparse.kernels.mvue24.triton import _sample, _seed_arguments
from megasparse.kernels.packed24 import COLUMN_MULTIPLE, Packed24, empty_packed, unit_scale
from megasparse.kernels.random import SeedLike


@dataclass(frozen=True)
class Launch:
    """Groups of 4 tokens a program handles (64 channels each) and its warps."""

    groups: int
    num_warps: int


LAUNCH = Launch(groups=32, num_warps=8)
# The interpreter costs time per program, not per element.
INTERPRETED = Launch(groups=64, num_warps=4)


@triton.jit
def _code16(w0, w1, w2, w3):
    """The kept two (int16 bits) of four, their code, and whether more than two are non-zero."""
    n0, n1 = (w0 & 0x7FFF) != 0, (w1 & 0x7FFF) != 0
    n2, n3 = (w2 & 0x7FFF) != 0, (w3 & 0x7FFF) != 0
    several = (n0 & n1) | (n0 & n2) | (n1 & n2)
    v0 = tl.where(n0, w0, tl.where(n1, w1, w2))
    last = n3 | (several == 0)
    v1 = tl.where(last, w3, tl.where(n2, w2, w1))
    i0 = tl.where(n0, 0, tl.where(n1, 1, 2))
    i1 = tl.where(last, 12, tl.where(n2, 8, 4))  # shifted left by 2
    word = (v0.to(tl.int32) & 0xFFFF) | (v1.to(tl.int32) << 16)
    return word, i0 | i1, (several & n3) | (n0 & n1 & n2)


@triton.jit(do_not_specialize=["key", "high", "first_other"])
def _mvue_pack16_kernel(
    dz_ptr,
    words_ptr,
    metadata_ptr,
    flag_ptr,
    seed_ptr,
    key,
    high,
    num_tokens,
    padded_tokens,
    dz_stride,
    first_channel,
    first_other,
    EXACT: tl.constexpr,
    GROUPS: tl.constexpr,
):
    tiles = padded_tokens // (4 * GROUPS)
    pid = tl.program_id(0)
    block_row, tile = pid // tiles, pid % tiles
    group = tile * GROUPS + tl.arange(0, GROUPS)[:, None]
    channel = block_row * 64 + tl.arange(0, 64)[None, :]
    dz_stride = tl.cast(dz_stride, tl.int64)
    token = group.to(tl.int64) * 4
    ptrs = dz_ptr + token * dz_stride + (first_channel + channel)
    dtype: tl.constexpr = dz_ptr.dtype.element_ty
    x0 = tl.load(ptrs, mask=token < num_tokens, other=0.0).to(tl.float32)
    x1 = tl.load(ptrs + dz_stride, mask=token + 1 < num_tokens, other=0.0).to(tl.float32)
    x2 = tl.load(ptrs + 2 * dz_stride, mask=token + 2 < num_tokens, other=0.0).to(tl.float32)
    x3 = tl.load(ptrs + 3 * dz_stride, mask=token + 3 < num_tokens, other=0.0).to(tl.float32)
    other = channel.to(tl.uint32) + first_other.to(tl.uint32)
    o0, o1, o2, o3 = _sample(x0, x1, x2, x3, group.to(tl.uint32), other, seed_ptr, key, high, EXACT)
    word, code, violated = _code16(
        o0.to(dtype).to(tl.int16, bitcast=True),
        o1.to(dtype).to(tl.int16, bitcast=True),
        o2.to(dtype).to(tl.int16, bitcast=True),
        o3.to(dtype).to(tl.int16, bitcast=True),
    )
    tl.store(flag_ptr, 1, mask=tl.max(tl.max(violated.to(tl.int32), 1), 0) != 0)
    # A word holds the two values that a group of this channel keeps: row `channel` of the packed
    # values, column `group`.
    row = (first_channel + block_row.to(tl.int64) * 64) + tl.arange(0, 64)[:, None]
    column = tile * GROUPS + tl.arange(0, GROUPS)[None, :]
    tl.store(words_ptr + row * (padded_tokens // 4) + column, tl.trans(word))
    # Rows r and r + 8 share their bytes: (a, h, b, groups) -> low and high nibbles.
    code = tl.reshape(tl.trans(code), (4, 2, 8, GROUPS))
    low, upper = tl.split(tl.permute(code, (0, 2, 3, 1)))
    byte = (low | (upper << 4)).to(tl.uint8)
    # (a, b, G, gh, gl) -> (G, a, b, gl, gh)
    byte = tl.permute(tl.reshape(byte, (4, 8, GROUPS // 8, 2, 4)), (2, 0, 1, 4, 3))
    start = (first_channel // 64 + block_row).to(tl.int64) * 8 * padded_tokens
    offset = start + tile * (32 * GROUPS) + tl.arange(0, 32 * GROUPS)
    tl.store(metadata_ptr + offset, tl.reshape(byte, (32 * GROUPS,)))


def mvue_pack24(
    dz: torch.Tensor,
    seed: SeedLike,
    channels: tuple[tuple[int, int, int], ...],
    exact: bool,
    error_flag: torch.Tensor | None,
) -> Packed24:
    """See `megasparse.kernels.mvue_pack24`; arguments are checked there."""
    if dz.stride(1) != 1:
        dz = dz.contiguous()
    tokens, width = dz.shape
    multiple = COLUMN_MULTIPLE[dz.dtype]
    padded = -(-tokens // multiple) * multiple
    launch = INTERPRETED if INTERPRETING else LAUNCH
    groups = launch.groups
    while padded % (4 * groups):
        groups //= 2
    packed = empty_packed((width, padded), dz.dtype, unit_scale(dz.device), dz.device)
    if error_flag is None:
        error_flag = torch.zeros(1, dtype=torch.int32, device=dz.device)
    seed_ptr, key, high = _seed_arguments(seed)
    for start, place, length in channels:
        grid = ((length // 64) * (padded // (4 * groups)),)
        _mvue_pack16_kernel[grid](
            dz,
            packed.values.view(torch.int32),
            packed.metadata,
            error_flag,
            seed_ptr,
            key,
            high,
            tokens,
            padded,
            dz.stride(0),
            start,
            place,
            EXACT=exact,
            GROUPS=groups,
            num_warps=launch.num_warps,
            enable_fp_fusion=False,
        )
    return packed
