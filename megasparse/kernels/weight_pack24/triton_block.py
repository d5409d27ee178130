"""Functions for the kernel of `weight_pack24`: 4x4 blocks of the weight, one a lane."""

from __future__ import annotations

import triton
import triton.language as tl

from megasparse.kernels.device.groups import larger, load_bits, to_fp32
from megasparse.kernels.device.layout24 import (
    amax_of,
    join4,
    masked_word,
    nan_bits,
    nans_of,
    select,
    to_word,
    word_of,
)
from megasparse.kernels.soft_threshold24.triton import soft_threshold_group


@triton.jit
def place_in_stack(block_row, own_rows, num_columns, STACKED: tl.constexpr):
    """The number of 64 rows in their part of a stack, and the entries (int64) of the parts before.

    Args:
        block_row: their number in the whole.
        own_rows: of a part.
    """
    if STACKED:
        part = block_row // (own_rows // 64)
        entries = part.to(tl.int64) * own_rows * num_columns
        return block_row - part * (own_rows // 64), entries
    else:
        return block_row, tl.full((), 0, tl.int64)


@triton.jit
def load_block(w, group, stride, KIND: tl.constexpr):
    """The bits of 4x4 blocks: four rows of four entries."""
    live = tl.full(group.shape, 1, tl.int1)
    return (
        load_bits(w, group, live, KIND),
        load_bits(w, group + stride, live, KIND),
        load_bits(w, group + 2 * stride, live, KIND),
        load_bits(w, group + 3 * stride, live, KIND),
    )


@triton.jit
def load_mask(mask, group, stride):
    """The mask of 4x4 blocks: for each row a uint32 of four bytes, 0 or 1."""
    return (
        tl.load(mask + group).to(tl.uint32, bitcast=True),
        tl.load(mask + group + stride).to(tl.uint32, bitcast=True),
        tl.load(mask + group + 2 * stride).to(tl.uint32, bitcast=True),
        tl.load(mask + group + 3 * stride).to(tl.uint32, bitcast=True),
    )


@triton.jit
def _row(loaded, kept, beta, scale, MASK: tl.constexpr, KIND: tl.constexpr, OUT: tl.constexpr):
    """One group a lane of one row: its word, bits of `nan_bits`, and its largest |W~|."""
    if MASK and KIND == OUT:  # no float at all
        word = word_of(loaded[0], loaded[1], loaded[2], loaded[3])
        found = nans_of(word, OUT)
        word = masked_word(word, kept, OUT)
        amax = amax_of(word, KIND)
    else:
        a, b = to_fp32(loaded[0], KIND), to_fp32(loaded[1], KIND)
        c, d = to_fp32(loaded[2], KIND), to_fp32(loaded[3], KIND)
        if MASK:
            word = to_word(a, b, c, d, scale, OUT)
            found = nans_of(word, OUT)
            word = masked_word(word, kept, OUT)
            # Products with 0 or 1: they run beside the logic, whose units are the busy ones.
            a = to_fp32(loaded[0] * (kept & 0xFF).to(tl.int32), KIND)
            b = to_fp32(loaded[1] * ((kept >> 8) & 0xFF).to(tl.int32), KIND)
            c = to_fp32(loaded[2] * ((kept >> 16) & 0xFF).to(tl.int32), KIND)
            d = to_fp32(loaded[3] * (kept >> 24).to(tl.int32), KIND)
        else:
            a, b, c, d, nan = soft_threshold_group(a, b, c, d, KIND)
            a, b, c, d = a * beta, b * beta, c * beta, d * beta
            word = to_word(a, b, c, d, scale, OUT)
            found = tl.where(nan, nan_bits(OUT), 0).to(tl.uint32)
        amax = larger(larger(tl.abs(a), tl.abs(b)), larger(tl.abs(c), tl.abs(d)))
    return word, found, amax


@triton.jit
def select_four(words, OUT: tl.constexpr):
    """The kept of four groups, and their codes as nibbles."""
    k0, code0 = select(words[0], OUT)
    k1, code1 = select(words[1], OUT)
    k2, code2 = select(words[2], OUT)
    k3, code3 = select(words[3], OUT)
    return (k0, k1, k2, k3), (code0 | (code1 << 4)) | ((code2 << 8) | (code3 << 12))


@triton.jit
def _pruned(word, OUT: tl.constexpr):
    """A word with the two largest magnitudes of its four numbers; of equals the later stays.

    Magnitudes with their places below them are four different integers, and the second largest of
    those is the least that is kept.
    """
    if OUT == "e4m3":
        a, b = word & 0x7F, (word >> 8) & 0x7F
        c, d = (word >> 16) & 0x7F, (word >> 24) & 0x7F
    else:
        low, high = word.to(tl.uint32), (word >> 32).to(tl.uint32)
        a, b = low & 0x7FFF, (low >> 16) & 0x7FFF
        c, d = high & 0x7FFF, (high >> 16) & 0x7FFF
    a, b, c, d = a << 2, (b << 2) | 1, (c << 2) | 2, (d << 2) | 3
    most = tl.minimum(tl.maximum(a, b), tl.maximum(c, d))
    least = tl.maximum(most, tl.maximum(tl.minimum(a, b), tl.minimum(c, d)))
    kept = (a >= least).to(tl.uint32) | ((b >= least).to(tl.uint32) << 8)
    kept = kept | ((c >= least).to(tl.uint32) << 16) | ((d >= least).to(tl.uint32) << 24)
    return masked_word(word, kept, OUT)


@triton.jit
def prune_four(words, OUT: tl.constexpr):
    """Four groups, each with its two largest magnitudes alone."""
    return (
        _pruned(words[0], OUT),
        _pruned(words[1], OUT),
        _pruned(words[2], OUT),
        _pruned(words[3], OUT),
    )


@triton.jit
def block(
    loaded,
    kept,
    beta,
    scale,
    values,
    group,
    stride,
    MASK: tl.constexpr,
    KIND: tl.constexpr,
    OUT: tl.constexpr,
):
    """A 4x4 block a lane: stores the kept of its rows, returns the words of its rows and more.

    Then the codes of the rows, bits of `nan_bits`, and the largest |W~|.
    """
    w0, found0, amax0 = _row(loaded[0], kept[0], beta, scale, MASK, KIND, OUT)
    w1, found1, amax1 = _row(loaded[1], kept[1], beta, scale, MASK, KIND, OUT)
    w2, found2, amax2 = _row(loaded[2], kept[2], beta, scale, MASK, KIND, OUT)
    w3, found3, amax3 = _row(loaded[3], kept[3], beta, scale, MASK, KIND, OUT)
    packed, codes = select_four((w0, w1, w2, w3), OUT)
    kind: tl.constexpr = values.dtype.element_ty
    tl.store(values + group, packed[0].to(kind))
    tl.store(values + group + stride, packed[1].to(kind))
    tl.store(values + group + 2 * stride, packed[2].to(kind))
    tl.store(values + group + 3 * stride, packed[3].to(kind))
    amax = larger(larger(amax0, amax1), larger(amax2, amax3))
    return (w0, w1, w2, w3), codes, (found0 | found1) | (found2 | found3), amax


@triton.jit
def crowded(kept, BOTH: tl.constexpr):
    """Masks of a 4x4 block: a bit of 0x80808080 where a row, or with BOTH a column, keeps over 2.

    The bytes of a product with 0x01010101 are sums; 0x7D and 3 make 0x80.
    """
    m0, m1, m2, m3 = kept[0], kept[1], kept[2], kept[3]
    found = (m0 * 0x01010101 + 0x7D000000) | (m1 * 0x01010101 + 0x7D000000)
    found = found | (m2 * 0x01010101 + 0x7D000000) | (m3 * 0x01010101 + 0x7D000000)
    found = found & 0x80000000
    if BOTH:
        found = found | (((m0 + m1) + (m2 + m3) + 0x7D7D7D7D) & 0x80808080)
    return found


@triton.jit
def stacked(low, high, OUT: tl.constexpr):
    """What two groups of a column keep, one above the other, as one word."""
    if OUT == "e4m3":
        return (low & 0xFFFF) | (high << 16)
    else:
        return low.to(tl.uint64) | (high.to(tl.uint64) << 32)


@triton.jit
def transposed_tile(x0, x1, x2, x3, GROUPS: tl.constexpr):
    """(4 * GROUPS, 8): the words (8, GROUPS) of the columns 4 C, 4 C + 1, 4 C + 2, 4 C + 3."""
    return tl.trans(tl.reshape(join4(x0, x1, x2, x3), (8, 4 * GROUPS)))
