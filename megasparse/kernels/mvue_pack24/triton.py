"""Triton kernel of `mvue_pack24`: dZ is read once, coalesced along channels, and leaves packed.

A program takes 64 channels (the height of a metadata block) by 4 * GROUPS tokens. A thread holds
eight channels of groups of four tokens: 16 bytes of each. What a group keeps, two values in one
32-bit word and a code, is transposed on its way out: half of the bytes that came in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from megasparse.kernels.device.groups import first_token, raise_flag, widen
from megasparse.kernels.device.layout24 import crowded16, select16, to_word
from megasparse.kernels.dispatch import INTERPRETING
from megasparse.kernels.mvue24.places import FIRST, Places, group_shifts
from megasparse.kernels.mvue24.triton_packed import packed16, sample, signs16
from megasparse.kernels.mvue24.triton_sampler import draw, sample_scaled, seed_arguments, seed_of
from megasparse.kernels.mvue24.triton_tile import (
    load_group,
    number_of,
    parts_of_tiles,
    place_in_part,
    tiles,
)
from megasparse.kernels.packed24 import (
    COLUMN_MULTIPLE,
    Packed24,
    empty_packed,
    parts_of,
    unit_scale,
)
from megasparse.kernels.random import SeedLike


@dataclass(frozen=True)
class Launch:
    """Most groups of 4 tokens a program handles, 64 channels each, and its warps.

    registers: the most that a thread may have.
    """

    groups: int
    num_warps: int
    registers: int


LAUNCH = Launch(groups=16, num_warps=2, registers=96)
APPROXIMATE = Launch(groups=16, num_warps=4, registers=96)
# The interpreter costs time per program, not per element.
INTERPRETED = Launch(groups=64, num_warps=4, registers=64)


@triton.jit
def _prune(x0, x1, x2, x3, group, other, flag_ptr, key, high, EXACT: tl.constexpr):
    """The two numbers that each group keeps (uint32), and their code (uint8)."""
    KIND: tl.constexpr = "bf16" if x0.dtype == tl.bfloat16 else "fp16"
    a0, a1, a2, a3 = widen(x0), widen(x1), widen(x2), widen(x3)
    if EXACT:
        word, _ = draw(a0, group, other, key, high)
        return packed16(sample(a0, a1, a2, a3, word), signs16(x0, x1, x2, x3), KIND)
    else:
        o0, o1, o2, o3, _, _ = sample_scaled(a0, a1, a2, a3, group, other, key, high, 1.0, False)
        word = to_word(o0, o1, o2, o3, 1.0, KIND)
        raise_flag(flag_ptr, (crowded16(word) >> 31).to(tl.int32))
        kept, code = select16(word)
        return kept, code.to(tl.uint8)


@triton.jit(
    do_not_specialize=[
        "key", "high", "first_tile", "first_other", "split", "first_shift", "second_shift",
    ]
)  # fmt: skip
def _mvue_pack16_kernel(
    dz_ptr,
    words_ptr,
    metadata_ptr,
    flag_ptr,
    groups_ptr,
    parts_ptr,
    seed_ptr,
    key,
    high,
    num_tokens,
    padded_tokens,
    first_tile,
    dz_stride,
    width,
    first_channel,
    first_other,
    split,
    first_shift,
    second_shift,
    SHIFTED: tl.constexpr,
    EXACT: tl.constexpr,
    STRIDED: tl.constexpr,
    GROUPS: tl.constexpr,
    FULL: tl.constexpr,
):
    # No division here: each would cost as much as a group of four gradients.
    block_row, tile = tl.program_id(0), first_tile + tl.program_id(1)
    group = tile * GROUPS + tl.arange(0, GROUPS)[:, None]
    column = block_row * 64 + tl.arange(0, 64)[None, :]
    other = column.to(tl.uint32) + first_other.to(tl.uint32)
    key, high = seed_of(seed_ptr, key, high)
    token = first_token(group, STRIDED)
    ptrs = dz_ptr + token * dz_stride + (first_channel + column)
    x0, x1, x2, x3 = load_group(ptrs, dz_stride, token, num_tokens, padded_tokens, STRIDED, FULL)
    group = number_of(groups_ptr, group, split, first_shift, second_shift, SHIFTED).to(tl.uint32)
    kept, code = _prune(x0, x1, x2, x3, group, other, flag_ptr, key, high, EXACT)
    # A word holds the two values that a group of this channel keeps: row `channel` of the packed
    # values, column `group`.
    first_row = first_channel + block_row.to(tl.int64) * 64
    words_ptr, metadata_ptr, tile, padded_tokens = place_in_part(
        words_ptr, metadata_ptr, parts_ptr, tile, padded_tokens, width, 4 * GROUPS, 8
    )
    row = first_row + tl.arange(0, 64)[:, None]
    out = words_ptr + row * (padded_tokens // 4) + (tile * GROUPS + tl.arange(0, GROUPS)[None, :])
    tl.store(out, tl.trans(kept).to(tl.int32, bitcast=True))
    # Rows r and r + 8 share their bytes: (G, gh, gl, a, h, b) -> (G, a, b, gl, gh, h).
    code = tl.reshape(code, (GROUPS // 8, 2, 4, 4, 2, 8))
    code = tl.reshape(tl.permute(code, (0, 3, 5, 2, 1, 4)), (32 * GROUPS, 2))
    low, upper = tl.split(code)
    offset = first_row * (padded_tokens // 8) + tile * (32 * GROUPS) + tl.arange(0, 32 * GROUPS)
    tl.store(metadata_ptr + offset, low | (upper << 4))


def mvue_pack24(
    dz: torch.Tensor,
    seed: SeedLike,
    channels: tuple[tuple[int, int, int], ...],
    places: Places,
    exact: bool,
    strided: bool,
    error_flag: torch.Tensor | None,
) -> Packed24:
    """See `megasparse.kernels.mvue_pack24`; arguments are checked there."""
    multiple = COLUMN_MULTIPLE[dz.dtype]
    padded = -(-dz.shape[0] // multiple) * multiple
    tile = _groups_of_tile(padded, exact)
    return _launch(dz, seed, channels, places, exact, strided, error_flag, padded, tile)


def mvue_pack24_experts(
    dz: torch.Tensor,
    seed: SeedLike,
    groups: torch.Tensor,
    counts: Sequence[int],
    channels: tuple[tuple[int, int, int], ...],
    exact: bool,
    error_flag: torch.Tensor | None,
) -> tuple[Packed24, ...]:
    """See experts.py; arguments are checked there."""
    tile = _groups_of_tile(math.gcd(*counts), exact)
    parts = parts_of_tiles(counts, 4 * tile, dz.device)
    packed = _launch(
        dz, seed, channels, FIRST, exact, False, error_flag, dz.shape[0], tile, groups, parts
    )
    return parts_of(packed, counts)


def _groups_of_tile(tokens: int, exact: bool) -> int:
    """Groups of a program, whose tokens divide `tokens`."""
    groups = _launch_of(exact).groups
    while tokens % (4 * groups):
        groups //= 2
    return groups


def _launch_of(exact: bool) -> Launch:
    return INTERPRETED if INTERPRETING else LAUNCH if exact else APPROXIMATE


def _launch(
    dz: torch.Tensor,
    seed: SeedLike,
    channels: tuple[tuple[int, int, int], ...],
    places: Places,
    exact: bool,
    strided: bool,
    error_flag: torch.Tensor | None,
    padded: int,
    groups_of_tile: int,
    groups: torch.Tensor | None = None,
    parts: torch.Tensor | None = None,
) -> Packed24:
    """The packed `(N, padded)`.

    Args:
        groups, parts: see `number_of` and `place_in_part`; None: there are none.
    """
    if dz.stride(1) != 1:
        dz = dz.contiguous()
    (tokens, width), launch = dz.shape, _launch_of(exact)
    packed = empty_packed((width, padded), dz.dtype, unit_scale(dz.device), dz.device)
    if error_flag is None:
        error_flag = torch.zeros(1, dtype=torch.int32, device=dz.device)
    seed_ptr, key, high = seed_arguments(seed)
    shifts = group_shifts(places)
    for start, place, length in channels:
        for grid, first_tile in tiles(length // 64, padded // (4 * groups_of_tile)):
            with torch.cuda.device_of(dz):  # Triton launches on the current device
                _mvue_pack16_kernel[grid](
                    dz,
                    packed.values.view(torch.int32),
                    packed.metadata if parts is None else packed.buffer,
                    error_flag,
                    groups,
                    parts,
                    seed_ptr,
                    key,
                    high,
                    tokens,
                    padded,
                    first_tile,
                    dz.stride(0),
                    width,
                    start,
                    place,
                    *(shifts or (0, 0, 0)),
                    SHIFTED=shifts is not None,
                    EXACT=exact,
                    STRIDED=strided,
                    GROUPS=groups_of_tile,
                    FULL=tokens == padded,
                    num_warps=launch.num_warps,
                    maxnreg=launch.registers,
                    enable_fp_fusion=False,
                )
    return packed
