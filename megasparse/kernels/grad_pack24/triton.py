"""Triton kernel of `grad_pack24`: dZ is read once, coalesced along channels.

A program takes 64 channels (the height of a metadata block) by 8 * PAIRS tokens. A thread holds
eight channels of eight tokens, two groups: it writes eight bytes of the row-major copy at a time,
and only what the groups keep, one 32-bit word for both, and their codes move between threads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from megasparse.kernels.dispatch import INTERPRETING
from megasparse.kernels.float8 import E5M2
from megasparse.kernels.float8.triton import e4m3_word, raise_amax, to_float8
from megasparse.kernels.groups.triton import raise_flag, widen
from megasparse.kernels.layout24.triton import crowded8, select8
from megasparse.kernels.mvue24.triton import _sample, _seed_arguments
from megasparse.kernels.packed24 import Packed24
from megasparse.kernels.random import SeedLike


@dataclass(frozen=True)
class Launch:
    """Most pairs of groups (8 tokens) a program handles, 64 channels each, and its warps.

    registers: the most that a thread may have; five programs fit on an SM.
    """

    pairs: int
    num_warps: int
    registers: int


LAUNCH = Launch(pairs=16, num_warps=4, registers=96)
# The interpreter costs time per program, not per element.
INTERPRETED = Launch(pairs=64, num_warps=4, registers=96)


@triton.jit
def _max(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _largest(x):
    return _max(_max(tl.abs(x[0]), tl.abs(x[1])), _max(tl.abs(x[2]), tl.abs(x[3])))


@triton.jit
def _load(dz_ptr, group, channel, num_tokens, dz_stride):
    """The four tokens of a group; zeros after the last token."""
    token = group.to(tl.int64) * 4
    ptrs = dz_ptr + token * dz_stride + channel
    x0 = tl.load(ptrs, mask=token < num_tokens, other=0.0)
    x1 = tl.load(ptrs + dz_stride, mask=token + 1 < num_tokens, other=0.0)
    x2 = tl.load(ptrs + 2 * dz_stride, mask=token + 2 < num_tokens, other=0.0)
    x3 = tl.load(ptrs + 3 * dz_stride, mask=token + 3 < num_tokens, other=0.0)
    return widen(x0), widen(x1), widen(x2), widen(x3)


@triton.jit
def _store_rows(row_ptr, x, scale, group, channel, num_tokens, row_stride, E5M2: tl.constexpr):
    token = group.to(tl.int64) * 4
    ptrs = row_ptr + token * row_stride + channel
    tl.store(ptrs, to_float8(x[0] * scale, E5M2), mask=token < num_tokens)
    tl.store(ptrs + row_stride, to_float8(x[1] * scale, E5M2), mask=token + 1 < num_tokens)
    tl.store(ptrs + 2 * row_stride, to_float8(x[2] * scale, E5M2), mask=token + 2 < num_tokens)
    tl.store(ptrs + 3 * row_stride, to_float8(x[3] * scale, E5M2), mask=token + 3 < num_tokens)


@triton.jit
def _prune(x, scale, group, other, seed_ptr, key, high, EXACT: tl.constexpr):
    """MVUE of a group in e4m3: what `select8` and `crowded8` say of it, and the largest before."""
    o0, o1, o2, o3 = _sample(
        x[0], x[1], x[2], x[3], group.to(tl.uint32), other, seed_ptr, key, high, EXACT
    )
    word = e4m3_word(o0 * scale, o1 * scale, o2 * scale, o3 * scale)
    kept, code = select8(word)
    return kept, code, crowded8(word), _largest((o0, o1, o2, o3))


@triton.jit(do_not_specialize=["key", "high", "first_other"])
def _grad_pack24_kernel(
    dz_ptr,
    row_ptr,
    words_ptr,
    metadata_ptr,
    row_scale_ptr,
    packed_scale_ptr,
    inverse_ptr,
    row_amax_ptr,
    packed_amax_ptr,
    flag_ptr,
    seed_ptr,
    key,
    high,
    num_tokens,
    padded_tokens,
    dz_stride,
    row_stride,
    first_channel,
    first_other,
    EXACT: tl.constexpr,
    E5M2: tl.constexpr,
    PAIRS: tl.constexpr,
):
    blocks = tl.num_programs(0) // (padded_tokens // (8 * PAIRS))
    pid = tl.program_id(0)
    tile, block_row = pid // blocks, pid % blocks
    pair = tile * PAIRS + tl.arange(0, PAIRS)[:, None]
    local = block_row * 64 + tl.arange(0, 64)[None, :]
    channel = first_channel + local
    other = local.to(tl.uint32) + first_other.to(tl.uint32)
    dz_stride, row_stride = tl.cast(dz_stride, tl.int64), tl.cast(row_stride, tl.int64)
    packed_scale = tl.load(packed_scale_ptr)
    tl.store(inverse_ptr, tl.div_rn(1.0, packed_scale), mask=pid == 0)
    scale = 1.0
    if row_ptr is not None:
        scale = tl.load(row_scale_ptr)
    # Loads and stores keep this order; the second group's loads pass the first one's arithmetic.
    x = _load(dz_ptr, 2 * pair, channel, num_tokens, dz_stride)
    if row_ptr is not None:
        _store_rows(row_ptr, x, scale, 2 * pair, channel, num_tokens, row_stride, E5M2)
    kept, code, bad, packed_amax = _prune(
        x, packed_scale, 2 * pair, other, seed_ptr, key, high, EXACT
    )
    x1 = _load(dz_ptr, 2 * pair + 1, channel, num_tokens, dz_stride)
    if row_ptr is not None:
        _store_rows(row_ptr, x1, scale, 2 * pair + 1, channel, num_tokens, row_stride, E5M2)
    kept1, code1, bad1, packed_amax1 = _prune(
        x1, packed_scale, 2 * pair + 1, other, seed_ptr, key, high, EXACT
    )
    if row_amax_ptr is not None:
        raise_amax(row_amax_ptr, _max(_largest(x), _largest(x1)))
    if packed_amax_ptr is not None:
        raise_amax(packed_amax_ptr, _max(packed_amax, packed_amax1))
    raise_flag(flag_ptr, ((bad | bad1) >> 31).to(tl.int32))
    # Row `channel` of the packed values has a word for each pair of groups.
    row = first_channel + block_row.to(tl.int64) * 64 + tl.arange(0, 64)[:, None]
    column = tile * PAIRS + tl.arange(0, PAIRS)[None, :]
    words = tl.trans((kept & 0xFFFF) | (kept1 << 16)).to(tl.int32, bitcast=True)
    tl.store(words_ptr + row * (padded_tokens // 8) + column, words)
    byte = tl.reshape((code | (code1 << 4)).to(tl.uint8), (PAIRS // 8, 2, 4, 4, 2, 8))
    # (G, g8, gq, a, h, b) -> (G, a, b, gq, g8, h)
    byte = tl.permute(byte, (0, 3, 5, 2, 1, 4))
    start = (first_channel // 64 + block_row).to(tl.int64) * 8 * padded_tokens
    offset = start + tile * (64 * PAIRS) + tl.arange(0, 64 * PAIRS)
    tl.store(metadata_ptr + offset, tl.reshape(byte, (64 * PAIRS,)))


def grad_pack24(
    dz: torch.Tensor,
    seed: SeedLike,
    channels: tuple[tuple[int, int, int], ...],
    exact: bool,
    scales: tuple[torch.Tensor | None, torch.Tensor],
    row: torch.Tensor | None,
    packed: Packed24,
    maxima: tuple[torch.Tensor | None, torch.Tensor | None],
    flag: torch.Tensor,
) -> None:
    """See reference.py."""
    if dz.stride(1) != 1:
        dz = dz.contiguous()
    padded = packed.shape[1]
    launch = INTERPRETED if INTERPRETING else LAUNCH
    pairs = launch.pairs
    while padded % (8 * pairs):
        pairs //= 2
    seed_ptr, key, high = _seed_arguments(seed)
    row_amax, packed_amax = (None if amax is None else amax.view(torch.int32) for amax in maxima)
    with torch.cuda.device_of(dz):  # Triton launches on the current device
        for start, place, length in channels:
            _grad_pack24_kernel[((length // 64) * (padded // (8 * pairs)),)](
                dz,
                None if row is None else row.view(torch.int8),
                packed.values.view(torch.int32),
                packed.metadata,
                scales[0],
                scales[1],
                packed.scale,
                row_amax,
                packed_amax,
                flag,
                seed_ptr,
                key,
                high,
                dz.shape[0],
                padded,
                dz.stride(0),
                dz.shape[1],
                start,
                place,
                EXACT=exact,
                E5M2=row is not None and row.dtype == E5M2,
                PAIRS=pairs,
                num_warps=launch.num_warps,
                maxnreg=launch.registers,
                enable_fp_fusion=False,
            )
