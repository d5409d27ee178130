"""Triton kernel of `weight_pack24`: the weight is read once and leaves packed in both orientations.

A thread holds whole 4x4 blocks, two of them one above the other: groups along the rows and along
the columns are selected in registers, on words of four converted numbers. Only what leaves is
moved between threads: the transpose's kept values (half of the converted bytes) and the codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from megasparse.kernels.device.float8 import raise_amax
from megasparse.kernels.device.groups import larger, raise_flag
from megasparse.kernels.device.layout24 import (
    column_metadata,
    columns_of,
    nan_bits,
    row_metadata,
)
from megasparse.kernels.dispatch import INTERPRETING
from megasparse.kernels.launches import KINDS, group_words
from megasparse.kernels.packed24 import Packed24
from megasparse.kernels.weight_pack24.triton_block import (
    block,
    crowded,
    load_block,
    load_mask,
    place_in_stack,
    prune_four,
    select_four,
    stacked,
    transposed_tile,
)


@dataclass(frozen=True)
class Launch:
    """Most columns a program handles (64 rows each) and its warps.

    registers: the most that a thread may have; five programs fit on an SM.
    bands: blocks of 64 rows are handled together before the next columns: what they write to one
    row of the transpose is adjacent, and meets in the cache.
    """

    columns: int
    num_warps: int
    registers: int
    bands: int


LAUNCH = Launch(columns=128, num_warps=4, registers=96, bands=4)
# The interpreter costs time per program, not per element.
INTERPRETED = Launch(columns=1024, num_warps=4, registers=96, bands=2)


@triton.jit
def _weight_pack24_kernel(
    w,
    mask,
    beta_ptr,
    scale_ptr,
    scale_inv_ptr,
    values,
    metadata,
    values_t,
    metadata_t,
    amax_ptr,
    flag,
    nan_flag,
    own_rows,
    num_columns,
    blocks_of_beta,
    STACKED: tl.constexpr,
    KIND: tl.constexpr,
    OUT: tl.constexpr,
    PRUNE: tl.constexpr,
    COLUMNS: tl.constexpr,
    BANDS: tl.constexpr,
):
    """64 x COLUMNS of w; pointers to groups are to words. Without `metadata_t`, values_t is dense.

    With PRUNE columns are pruned to 2:4 before they are packed. `values_t` has a word for 8 rows
    (two groups) of w that is as wide as what those become. Of a stack of parts, of `own_rows` rows
    each, what they become follows one another; `entries` are of the parts before.
    """
    GROUPS: tl.constexpr = COLUMNS // 4
    BITS: tl.constexpr = 8 if OUT == "e4m3" else 16
    tiles = num_columns // COLUMNS
    pid = tl.program_id(0)
    tile = (pid // BANDS) % tiles
    block_row = (pid // (BANDS * tiles)) * BANDS + pid % BANDS
    own_row, entries = place_in_stack(block_row, own_rows, num_columns, STACKED)
    value_bytes, metadata_bytes = entries * BITS // 16, entries // 8
    beta, scale, scale_inv = 1.0, 1.0, 1.0
    if mask is None:
        beta = tl.load(beta_ptr + block_row // blocks_of_beta)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr)
        scale_inv = tl.div_rn(1.0, scale)
    tl.store(scale_inv_ptr, scale_inv, mask=pid == 0)

    stride = tl.cast(num_columns // 4, tl.int64)
    p = tl.arange(0, 8)[:, None]
    group = (block_row.to(tl.int64) * 64 + 8 * p) * stride + (
        tile * GROUPS + tl.arange(0, GROUPS)[None, :]
    )
    values += metadata_bytes // (BITS // 4)
    # Groups that a thread holds side by side: as many as 16 bytes of w.
    HELD: tl.constexpr = 1 if KIND == "fp32" else 2
    group = tl.max_contiguous(group, [1, HELD])
    MASK: tl.constexpr = mask is not None
    # All loads come first: the hardware has them under way at once, and keeps their order.
    upper_bits = load_block(w, group, stride, KIND)
    lower_bits = load_block(w, group + 4 * stride, stride, KIND)
    upper_mask, lower_mask = upper_bits, lower_bits  # stands in, unread, without a mask
    if MASK:
        BOTH: tl.constexpr = metadata_t is not None and not PRUNE
        upper_mask = load_mask(mask, group, stride)
        lower_mask = load_mask(mask, group + 4 * stride, stride)
        found = crowded(upper_mask, BOTH) | crowded(lower_mask, BOTH)
        raise_flag(flag, (found != 0).to(tl.int32))
    upper, upper_codes, nan, amax = block(
        upper_bits, upper_mask, beta, scale, values, group, stride, MASK, KIND, OUT
    )
    lower, lower_codes, lower_nan, lower_amax = block(
        lower_bits, lower_mask, beta, scale, values, group + 4 * stride, stride, MASK, KIND, OUT
    )
    raise_flag(nan_flag, ((nan | lower_nan) & nan_bits(OUT) != 0).to(tl.int32))
    if amax_ptr is not None:
        raise_amax(amax_ptr, larger(amax, lower_amax))
    byte = row_metadata(upper_codes | (lower_codes << 16), BITS, COLUMNS)
    start = block_row.to(tl.int64) * 8 * num_columns + tile * (8 * COLUMNS)
    tl.store(metadata + value_bytes + start + tl.arange(0, 8 * COLUMNS), byte)

    column = tile.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)[:, None]
    upper = columns_of(upper[0], upper[1], upper[2], upper[3])
    lower = columns_of(lower[0], lower[1], lower[2], lower[3])
    if metadata_t is not None:
        if PRUNE:
            upper, lower = prune_four(upper, OUT), prune_four(lower, OUT)
        kept, codes = select_four(upper, OUT)
        more, more_codes = select_four(lower, OUT)
        words = transposed_tile(
            stacked(kept[0], more[0], OUT),
            stacked(kept[1], more[1], OUT),
            stacked(kept[2], more[2], OUT),
            stacked(kept[3], more[3], OUT),
            GROUPS,
        )
        before = value_bytes + metadata_bytes
        place = column * (own_rows // 8) + own_row * 8 + tl.arange(0, 8)[None, :]
        place += before // (BITS // 2)
        tl.store(values_t + place, words.to(values_t.dtype.element_ty))
        byte = column_metadata(codes | (more_codes << 16), BITS, COLUMNS)
        block_column = (tile * (COLUMNS // 64) + tl.arange(0, COLUMNS // 64)[:, None]).to(tl.int64)
        inner = own_row * 512 + tl.arange(0, 512)[None, :]
        tl.store(metadata_t + before + block_column * 8 * own_rows + inner, byte)
    elif values_t is not None and BITS == 8:
        words = transposed_tile(
            upper[0].to(tl.uint64) | (lower[0].to(tl.uint64) << 32),
            upper[1].to(tl.uint64) | (lower[1].to(tl.uint64) << 32),
            upper[2].to(tl.uint64) | (lower[2].to(tl.uint64) << 32),
            upper[3].to(tl.uint64) | (lower[3].to(tl.uint64) << 32),
            GROUPS,
        )
        place = column * (own_rows // 8) + own_row * 8 + tl.arange(0, 8)[None, :]
        tl.store(values_t + entries // 8 + place, words.to(tl.int64, bitcast=True))
    elif values_t is not None:
        words = tl.join(
            transposed_tile(upper[0], upper[1], upper[2], upper[3], GROUPS),
            transposed_tile(lower[0], lower[1], lower[2], lower[3], GROUPS),
        )
        place = column * (own_rows // 4) + own_row * 16 + tl.arange(0, 16)[None, :]
        words = tl.reshape(words, (COLUMNS, 16)).to(tl.int64, bitcast=True)
        tl.store(values_t + entries // 4 + place, words)


def weight_pack24(
    w: torch.Tensor,
    mask: torch.Tensor | None,
    threshold_scale: torch.Tensor | None,
    scale: torch.Tensor | None,
    packed: Packed24,
    other: Packed24 | torch.Tensor | None,
    prune: bool,
    amax: torch.Tensor | None,
    flag: torch.Tensor,
    nan_flag: torch.Tensor,
    parts: int = 1,
) -> None:
    """Fill `packed`, its scale and `other` with what reference.py gives; raise amax and flags.

    prune: the columns of W~ are pruned to 2:4 for `other`.
    parts: equal matrices that are stacked in w; `packed` and `other` are the first's, and the
        others' follow in memory.
    """
    rows, total = w.shape
    launch = INTERPRETED if INTERPRETING else LAUNCH
    columns, bands = launch.columns, launch.bands
    while total % columns:
        columns //= 2
    while rows // 64 % bands:
        bands //= 2
    group = torch.int32 if packed.dtype.itemsize == 2 else torch.int16  # what a group keeps
    values_t, metadata_t = None, None
    if isinstance(other, Packed24):
        pair = torch.int64 if packed.dtype.itemsize == 2 else torch.int32
        values_t, metadata_t = other.values.view(pair), other.metadata
    elif other is not None:
        values_t = other.view(torch.int64)
    _weight_pack24_kernel[(rows // 64 * (total // columns),)](
        group_words(w),
        None if mask is None else group_words(mask),
        threshold_scale,
        scale,
        packed.scale,
        packed.values.view(group),
        packed.metadata,
        values_t,
        metadata_t,
        None if amax is None else amax.view(torch.int32),
        flag,
        nan_flag,
        rows // parts,
        total,
        rows // 64 // (1 if threshold_scale is None else threshold_scale.numel()),
        STACKED=parts > 1,
        KIND=KINDS[w.dtype],
        OUT=KINDS[packed.dtype],
        PRUNE=prune,
        COLUMNS=columns,
        BANDS=bands,
        num_warps=launch.num_warps,
        maxnreg=launch.registers,
        enable_fp_fusion=False,
    )
