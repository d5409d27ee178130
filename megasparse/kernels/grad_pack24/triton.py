"""Triton kernel of `grad_pack24`: dZ is read once, coalesced along channels.

A program takes 64 channels (the height of a metadata block) by 8 * PAIRS tokens. A thread holds
eight channels of eight tokens, two groups: it writes eight bytes of the row-major copy at a time,
and only what the groups keep, one 32-bit word for both, and their codes move between threads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from megasparse.kernels.device.float8 import raise_above
from megasparse.kernels.device.groups import first_token, widen
from megasparse.kernels.float8 import E5M2
from megasparse.kernels.grad_pack24.quantization import Quantization
from megasparse.kernels.mvue24.places import FIRST, Places, group_shifts
from megasparse.kernels.mvue24.triton_packed import signs16
from megasparse.kernels.mvue24.triton_sampler import seed_arguments, seed_of
from megasparse.kernels.mvue24.triton_tile import (
    Launch,
    load_group,
    number_of,
    parts_of_tiles,
    place_in_part,
    prune,
    store_packed,
    store_rows,
    tiles,
)
from megasparse.kernels.packed24 import Packed24, parts_of
from megasparse.kernels.random import SeedLike

# Five programs fit on a multiprocessor.
LAUNCH = Launch(pairs=16, num_warps=4, registers=96)


@triton.jit
def _load(
    dz_ptr,
    group,
    channel,
    num_tokens,
    padded_tokens,
    dz_stride,
    STRIDED: tl.constexpr,
    FULL: tl.constexpr,
):
    """The four tokens of a group, zeros after the last token; then their signs."""
    token = first_token(group, STRIDED)
    ptrs = dz_ptr + token * dz_stride + channel
    x0, x1, x2, x3 = load_group(ptrs, dz_stride, token, num_tokens, padded_tokens, STRIDED, FULL)
    return widen(x0), widen(x1), widen(x2), widen(x3), signs16(x0, x1, x2, x3)


@triton.jit(
    do_not_specialize=[
        "key", "high", "first_tile", "first_other", "split", "first_shift", "second_shift",
    ]
)  # fmt: skip
def _grad_pack24_kernel(
    dz_ptr,
    row_ptr,
    words_ptr,
    metadata_ptr,
    row_scale_ptr,
    packed_scale_ptr,
    scale_inv_ptr,
    row_amax_ptr,
    packed_amax_ptr,
    flag_ptr,
    sums_ptr,
    groups_ptr,
    parts_ptr,
    seed_ptr,
    key,
    high,
    num_tokens,
    padded_tokens,
    first_tile,
    dz_stride,
    row_stride,
    first_channel,
    first_other,
    split,
    first_shift,
    second_shift,
    SHIFTED: tl.constexpr,
    EXACT: tl.constexpr,
    STRIDED: tl.constexpr,
    E5M2: tl.constexpr,
    PAIRS: tl.constexpr,
    FULL: tl.constexpr,
):
    # No division here: each would cost as much as a group of four gradients.
    block_row, tile = tl.program_id(0), first_tile + tl.program_id(1)
    pair = tile * PAIRS + tl.arange(0, PAIRS)[:, None]
    # Where the channels lie in dz, and in the whole layer.
    column = block_row * 64 + tl.arange(0, 64)[None, :]
    channel = first_channel + column
    other = column.to(tl.uint32) + first_other.to(tl.uint32)
    dz_stride, row_stride = tl.cast(dz_stride, tl.int64), tl.cast(row_stride, tl.int64)
    key, high = seed_of(seed_ptr, key, high)
    row_amax, packed_amax = 0, 0
    if row_amax_ptr is not None:
        row_amax = tl.load(row_amax_ptr)
    if packed_amax_ptr is not None:
        packed_amax = tl.load(packed_amax_ptr)
    packed_scale = tl.load(packed_scale_ptr)
    if (block_row == 0) & (tile == 0):
        tl.store(scale_inv_ptr, tl.div_rn(1.0, packed_scale))
    # Loads and stores keep this order; the second group's loads pass the first one's arithmetic.
    x = _load(dz_ptr, 2 * pair, channel, num_tokens, padded_tokens, dz_stride, STRIDED, FULL)
    scale = 1.0
    if row_ptr is not None:
        scale = tl.load(row_scale_ptr)
        store_rows(
            row_ptr,
            x,
            scale,
            2 * pair,
            channel,
            num_tokens,
            padded_tokens,
            row_stride,
            STRIDED,
            E5M2,
            FULL,
        )
    total = x[0]
    if sums_ptr is not None:
        total = (x[0] + x[1]) + (x[2] + x[3])
    group = number_of(groups_ptr, 2 * pair, split, first_shift, second_shift, SHIFTED)
    pruned0 = prune(x, packed_scale, group, other, key, high, EXACT)
    x = _load(dz_ptr, 2 * pair + 1, channel, num_tokens, padded_tokens, dz_stride, STRIDED, FULL)
    if row_ptr is not None:
        store_rows(
            row_ptr,
            x,
            scale,
            2 * pair + 1,
            channel,
            num_tokens,
            padded_tokens,
            row_stride,
            STRIDED,
            E5M2,
            FULL,
        )
    if sums_ptr is not None:
        total = tl.sum(total + ((x[0] + x[1]) + (x[2] + x[3])), axis=0, keep_dims=True)
        tl.store(sums_ptr + tile.to(tl.int64) * row_stride + channel, total)
    group = number_of(groups_ptr, 2 * pair + 1, split, first_shift, second_shift, SHIFTED)
    pruned1 = prune(x, packed_scale, group, other, key, high, EXACT)
    if row_amax_ptr is not None:
        raise_above(row_amax_ptr, tl.maximum(pruned0[2], pruned1[2]), row_amax)
    if packed_amax_ptr is not None:
        raise_above(packed_amax_ptr, tl.maximum(pruned0[3], pruned1[3]), packed_amax)
    first_row = first_channel + block_row.to(tl.int64) * 64
    words_ptr, metadata_ptr, tile, padded_tokens = place_in_part(
        words_ptr, metadata_ptr, parts_ptr, tile, padded_tokens, row_stride, 8 * PAIRS, 4
    )
    store_packed(
        words_ptr,
        metadata_ptr,
        flag_ptr,
        pruned0,
        pruned1,
        first_row,
        tile,
        padded_tokens,
        EXACT,
        PAIRS,
    )


def grad_pack24(
    dz: torch.Tensor,
    seed: SeedLike,
    channels: tuple[tuple[int, int, int], ...],
    places: Places,
    exact: bool,
    strided: bool,
    how: Quantization,
) -> tuple[torch.Tensor | None, Packed24]:
    """See reference.py; raises amaxes and flag of `how`."""
    row, packed, flag = how.new_outputs(dz, dz.shape[0])
    _launch(dz, seed, channels, places, exact, strided, how, row, packed, flag)
    return row, packed


def grad_pack24_experts(
    dz: torch.Tensor,
    seed: SeedLike,
    groups: torch.Tensor,
    counts: Sequence[int],
    channels: tuple[tuple[int, int, int], ...],
    exact: bool,
    how: Quantization,
) -> tuple[torch.Tensor | None, tuple[Packed24, ...]]:
    """See experts.py; raises amaxes and flag of `how`."""
    row, packed, flag = how.new_outputs(dz, dz.shape[0])
    tokens = 8 * LAUNCH.fitted(math.gcd(*counts))[0]
    table = parts_of_tiles(counts, tokens, dz.device)
    _launch(dz, seed, channels, FIRST, exact, False, how, row, packed, flag, groups, table, tokens)
    return row, parts_of(packed, counts)


def _launch(
    dz: torch.Tensor,
    seed: SeedLike,
    channels: tuple[tuple[int, int, int], ...],
    places: Places,
    exact: bool,
    strided: bool,
    how: Quantization,
    row: torch.Tensor | None,
    packed: Packed24,
    flag: torch.Tensor,
    groups: torch.Tensor | None = None,
    parts: torch.Tensor | None = None,
    tile: int | None = None,
) -> None:
    """Fill `row` and `packed`.

    Args:
        groups, parts: see `number_of` and `place_in_part`; None: there are none.
        tile: tokens that divide all parts.
    """
    if dz.stride(1) != 1:
        dz = dz.contiguous()
    padded = packed.shape[1]
    pairs, options = LAUNCH.fitted(tile or padded)
    sums = how.new_sums(padded // (8 * pairs), dz.shape[1])
    seed_ptr, key, high = seed_arguments(seed)
    shifts = group_shifts(places)
    for start, place, length in channels:
        for grid, first_tile in tiles(length // 64, padded // (8 * pairs)):
            with torch.cuda.device_of(dz):  # Triton launches on the current device
                _grad_pack24_kernel[grid](
                    dz,
                    None if row is None else row.view(torch.int8),
                    packed.values.view(torch.int32),
                    packed.metadata if parts is None else packed.buffer,
                    how.row_scale,
                    how.packed_scale,
                    packed.scale,
                    None if how.row_amax is None else how.row_amax.view(torch.int32),
                    None if how.packed_amax is None else how.packed_amax.view(torch.int32),
                    flag,
                    sums,
                    groups,
                    parts,
                    seed_ptr,
                    key,
                    high,
                    dz.shape[0],
                    padded,
                    first_tile,
                    dz.stride(0),
                    packed.shape[0],
                    start,
                    place,
                    *(shifts or (0, 0, 0)),
                    SHIFTED=shifts is not None,
                    EXACT=exact,
                    STRIDED=strided,
                    E5M2=how.row_dtype == E5M2,
                    PAIRS=pairs,
                    FULL=dz.shape[0] == padded,
                    enable_fp_fusion=False,
                    **options,
                )
    how.add_sums(sums)
