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

from megasparse.kernels.dispatch import INTERPRETING
from megasparse.kernels.float8.triton import e4m3_word, raise_amax
from megasparse.kernels.groups import KINDS, group_words
from megasparse.kernels.groups.triton import (
    from_fp32,
    load_bits,
    raise_flag,
    rounded,
    to_fp32,
)
from megasparse.kernels.layout24.triton import (
    column_metadata,
    column_of,
    join4,
    row_metadata,
    select8,
    select16,
)
from megasparse.kernels.packed24 import Packed24

_INTERPRETING = tl.constexpr(INTERPRETING)


@dataclass(frozen=True)
class Launch:
    """Most columns a program handles (64 rows each), its warps, and how programs are ordered.

    `bands` blocks of 64 rows are handled together before the next columns: what they write to one
    row of the transpose is adjacent, and meets in the cache.
    """

    columns: int
    num_warps: int
    bands: int


LAUNCH = Launch(columns=128, num_warps=4, bands=4)
# The interpreter costs time per program, not per element.
INTERPRETED = Launch(columns=1024, num_warps=4, bands=2)


@triton.jit
def _max(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _shrunk(x, threshold, KIND: tl.constexpr):
    """sign(x) * max(|x| - threshold, 0), rounded to KIND; +0 also where both are infinite."""
    size = tl.abs(x)
    s = rounded(size - threshold, KIND)
    return tl.where(size > threshold, tl.where(x < 0, -s, s), 0.0)


@triton.jit
def _kept_bits(x, kept):
    return tl.where(kept != 0, x, 0.0)


@triton.jit
def _halves(low, high, KIND: tl.constexpr):
    """Two float32, rounded to nearest even as 16-bit numbers, in a uint64 below 2^32."""
    if KIND == "bf16" and _INTERPRETING:  # its conversion truncates
        low_bits = from_fp32(low, KIND).to(tl.uint32, bitcast=True) >> 16
        high_bits = from_fp32(high, KIND).to(tl.uint32, bitcast=True) >> 16
    elif KIND == "bf16":
        low_bits = low.to(tl.bfloat16).to(tl.uint16, bitcast=True).to(tl.uint32)
        high_bits = high.to(tl.bfloat16).to(tl.uint16, bitcast=True).to(tl.uint32)
    else:
        low_bits = low.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)
        high_bits = high.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)
    return (low_bits | (high_bits << 16)).to(tl.uint64)


@triton.jit
def _row(w, mask, beta, scale, group, KIND: tl.constexpr, OUT: tl.constexpr):
    """One group a lane of one row: its word, its largest |W~|, and the largest |w| or NaN."""
    live = tl.full(group.shape, 1, tl.int1)
    a, b, c, d = load_bits(w, group, live, KIND)
    a, b, c, d = to_fp32(a, KIND), to_fp32(b, KIND), to_fp32(c, KIND), to_fp32(d, KIND)
    low_ab, high_ab = tl.minimum(tl.abs(a), tl.abs(b)), _max(tl.abs(a), tl.abs(b))
    low_cd, high_cd = tl.minimum(tl.abs(c), tl.abs(d)), _max(tl.abs(c), tl.abs(d))
    largest = _max(high_ab, high_cd)
    if mask is None:
        threshold = tl.minimum(tl.maximum(low_ab, low_cd), tl.minimum(high_ab, high_cd))
        a, b = _shrunk(a, threshold, KIND) * beta, _shrunk(b, threshold, KIND) * beta
        c, d = _shrunk(c, threshold, KIND) * beta, _shrunk(d, threshold, KIND) * beta
    else:
        kept = tl.load(mask + group)
        a, b = _kept_bits(a, kept & 0xFF), _kept_bits(b, kept & 0xFF00)
        c, d = _kept_bits(c, kept & 0xFF0000), _kept_bits(d, kept & -0x1000000)
    amax = _max(_max(tl.abs(a), tl.abs(b)), _max(tl.abs(c), tl.abs(d)))
    if OUT == "e4m3":
        word = e4m3_word(a * scale, b * scale, c * scale, d * scale)
    else:
        word = _halves(a, b, OUT) | (_halves(c, d, OUT) << 32)
    return word, amax, largest


@triton.jit
def _select(word, OUT: tl.constexpr):
    if OUT == "e4m3":
        return select8(word)
    else:
        return select16(word)


@triton.jit
def _select_four(w0, w1, w2, w3, OUT: tl.constexpr):
    """The kept of four groups, their codes as nibbles, and 1 where one is crowded."""
    k0, code0, bad0 = _select(w0, OUT)
    k1, code1, bad1 = _select(w1, OUT)
    k2, code2, bad2 = _select(w2, OUT)
    k3, code3, bad3 = _select(w3, OUT)
    codes = (code0 | (code1 << 4)) | ((code2 << 8) | (code3 << 12))
    return (k0, k1, k2, k3), codes, (bad0 | bad1) | (bad2 | bad3)


@triton.jit
def _block(w, mask, beta, scale, values, group, stride, KIND: tl.constexpr, OUT: tl.constexpr):
    """A 4x4 block a lane: stores the kept of its rows, returns its columns.

    Returns four words of columns, the codes of the rows, 1 where one is crowded, and the maxima.
    """
    w0, amax0, most0 = _row(w, mask, beta, scale, group, KIND, OUT)
    w1, amax1, most1 = _row(w, mask, beta, scale, group + stride, KIND, OUT)
    w2, amax2, most2 = _row(w, mask, beta, scale, group + 2 * stride, KIND, OUT)
    w3, amax3, most3 = _row(w, mask, beta, scale, group + 3 * stride, KIND, OUT)
    kept, codes, bad = _select_four(w0, w1, w2, w3, OUT)
    kind: tl.constexpr = values.dtype.element_ty
    tl.store(values + group, kept[0].to(kind))
    tl.store(values + group + stride, kept[1].to(kind))
    tl.store(values + group + 2 * stride, kept[2].to(kind))
    tl.store(values + group + 3 * stride, kept[3].to(kind))
    columns = (
        column_of(w0, w1, w2, w3, 0),
        column_of(w0, w1, w2, w3, 1),
        column_of(w0, w1, w2, w3, 2),
        column_of(w0, w1, w2, w3, 3),
    )
    amax, most = _max(_max(amax0, amax1), _max(amax2, amax3)), _max(most0, most1)
    return columns, codes, bad, amax, _max(most, _max(most2, most3))


@triton.jit
def _stacked(low, high, OUT: tl.constexpr):
    """What two groups of a column keep, one above the other, as one word."""
    if OUT == "e4m3":
        return low | (high << 16)
    else:
        return low.to(tl.uint64) | (high.to(tl.uint64) << 32)


@triton.jit
def _transposed_tile(x0, x1, x2, x3, GROUPS: tl.constexpr):
    """(4 * GROUPS, 8): the words (8, GROUPS) of the columns 4 C, 4 C + 1, 4 C + 2, 4 C + 3."""
    return tl.trans(tl.reshape(join4(x0, x1, x2, x3), (8, 4 * GROUPS)))


@triton.jit
def _weight_pack24_kernel(
    w,
    mask,
    beta_ptr,
    scale_ptr,
    inverse_ptr,
    values,
    metadata,
    values_t,
    metadata_t,
    amax_ptr,
    flag,
    nan_flag,
    num_rows,
    num_columns,
    KIND: tl.constexpr,
    OUT: tl.constexpr,
    COLUMNS: tl.constexpr,
    BANDS: tl.constexpr,
):
    """64 x COLUMNS of w; pointers to groups are to words. Without `metadata_t`, values_t is dense.

    `values_t` has a word for 8 rows (two groups) of w that is as wide as what those become.
    """
    GROUPS: tl.constexpr = COLUMNS // 4
    BITS: tl.constexpr = 8 if OUT == "e4m3" else 16
    tiles = num_columns // COLUMNS
    pid = tl.program_id(0)
    tile = (pid // BANDS) % tiles
    block_row = (pid // (BANDS * tiles)) * BANDS + pid % BANDS
    beta, scale = 1.0, 1.0
    if mask is None:
        beta = tl.load(beta_ptr)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr)
    tl.store(inverse_ptr, tl.div_rn(1.0, scale), mask=pid == 0)

    stride = tl.cast(num_columns // 4, tl.int64)
    p = tl.arange(0, 8)[:, None]
    group = (block_row.to(tl.int64) * 64 + 8 * p) * stride + (
        tile * GROUPS + tl.arange(0, GROUPS)[None, :]
    )
    upper, upper_codes, bad, amax, largest = _block(
        w, mask, beta, scale, values, group, stride, KIND, OUT
    )
    lower, lower_codes, lower_bad, lower_amax, lower_largest = _block(
        w, mask, beta, scale, values, group + 4 * stride, stride, KIND, OUT
    )
    largest = _max(largest, lower_largest)
    raise_flag(nan_flag, (largest != largest).to(tl.int32))
    if amax_ptr is not None:
        raise_amax(amax_ptr, _max(amax, lower_amax))
    bad = bad | lower_bad
    byte = row_metadata(upper_codes | (lower_codes << 16), BITS, COLUMNS)
    start = block_row.to(tl.int64) * 8 * num_columns + tile * (8 * COLUMNS)
    tl.store(metadata + start + tl.arange(0, 8 * COLUMNS), byte)

    column = tile.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)[:, None]
    if metadata_t is not None:
        kept, codes, upper_bad = _select_four(upper[0], upper[1], upper[2], upper[3], OUT)
        more, more_codes, lower_bad = _select_four(lower[0], lower[1], lower[2], lower[3], OUT)
        bad = bad | (upper_bad | lower_bad)
        words = _transposed_tile(
            _stacked(kept[0], more[0], OUT),
            _stacked(kept[1], more[1], OUT),
            _stacked(kept[2], more[2], OUT),
            _stacked(kept[3], more[3], OUT),
            GROUPS,
        )
        place = column * (num_rows // 8) + block_row * 8 + tl.arange(0, 8)[None, :]
        tl.store(values_t + place, words.to(values_t.dtype.element_ty))
        byte = column_metadata(codes | (more_codes << 16), BITS, COLUMNS)
        block = (tile * (COLUMNS // 64) + tl.arange(0, COLUMNS // 64)[:, None]).to(tl.int64)
        inner = block_row * 512 + tl.arange(0, 512)[None, :]
        tl.store(metadata_t + block * 8 * num_rows + inner, byte)
    elif values_t is not None and BITS == 8:
        words = _transposed_tile(
            upper[0].to(tl.uint64) | (lower[0].to(tl.uint64) << 32),
            upper[1].to(tl.uint64) | (lower[1].to(tl.uint64) << 32),
            upper[2].to(tl.uint64) | (lower[2].to(tl.uint64) << 32),
            upper[3].to(tl.uint64) | (lower[3].to(tl.uint64) << 32),
            GROUPS,
        )
        place = column * (num_rows // 8) + block_row * 8 + tl.arange(0, 8)[None, :]
        tl.store(values_t + place, words.to(tl.int64, bitcast=True))
    elif values_t is not None:
        words = tl.join(
            _transposed_tile(upper[0], upper[1], upper[2], upper[3], GROUPS),
            _transposed_tile(lower[0], lower[1], lower[2], lower[3], GROUPS),
        )
        place = column * (num_rows // 4) + block_row * 16 + tl.arange(0, 16)[None, :]
        tl.store(values_t + place, tl.reshape(words, (COLUMNS, 16)).to(tl.int64, bitcast=True))
    raise_flag(flag, bad.to(tl.int32))


def weight_pack24(
    w: torch.Tensor,
    mask: torch.Tensor | None,
    threshold_scale: torch.Tensor | None,
    scale: torch.Tensor | None,
    packed: Packed24,
    other: Packed24 | torch.Tensor | None,
    amax: torch.Tensor | None,
    flag: torch.Tensor,
    nan_flag: torch.Tensor,
) -> None:
    """See reference.py; sets `nan_flag` to 1 when `w` holds a NaN."""
    rows, total = packed.shape
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
        rows,
        total,
        KIND=KINDS[w.dtype],
        OUT=KINDS[packed.dtype],
        COLUMNS=columns,
        BANDS=bands,
        num_warps=launch.num_warps,
        enable_fp_fusion=False,
    )
