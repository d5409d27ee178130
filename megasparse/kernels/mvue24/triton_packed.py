"""Functions for kernels: the exact sampler of `mvue24`, straight to the packed layout.

Of a group the sampler keeps at most two entries: the largest as `most`, another as `step`. So only
these two numbers are rounded, and all else is a matter of places, which are permutations of bytes.

The GPU compares, selects and permutes at half the rate of sums and products. So comparisons give
1.0 or 0.0, and sums of them are the permutations: an integer in the low bits of a float32 whose
nibbles name bytes for PTX's `prmt`. First come the entries by rank: the smaller of 0 and 1, the
smaller of 2 and 3, the smaller and the larger of the two others. Then they go to their places.

A group is never crowded here: the two numbers of the sampler's description mark at most two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megasparse.kernels.device.float8 import to_float8
from megasparse.kernels.device.groups import larger, pair16, permute_bytes, smaller
from megasparse.kernels.device.philox import uniform24
from megasparse.kernels.dispatch import INTERPRETING
from megasparse.kernels.mvue24.triton_sampler import threshold

_INTERPRETING = tl.constexpr(INTERPRETING)

# The kept two entries of a group by its non-zeros among the first three (bits 0, 1, 2): zeros fill
# up from the end, and with two non-zeros among three the last entry is zero.
_KEPT = ((2, 3), (0, 3), (1, 3), (0, 1), (2, 3), (0, 2), (1, 2), (0, 2))


def _table(shift: int) -> int:
    """The kept two of all cases as i0 | i1 << shift, a byte each."""
    return sum((i0 | i1 << shift) << 8 * case for case, (i0, i1) in enumerate(_KEPT))


_CODES = tl.constexpr(_table(2))
_NIBBLES = tl.constexpr(_table(4))

# Selectors are sums above 2^23, where float32 counts in ones.
# By rank, 16 times more each: 8 for zero (the sign of byte 0, all over the byte), 4 or 0 for
# `step`, marked once or twice; for the largest 5 for `most`, or 8. At first both marks are on the
# middle.
_RANKS = tl.constexpr(2.0**23 + 8 + 16 * 8 + 256 * 0 + 4096 * 8)
# The ranks at the four places when both winners are second and the larger is of 2 and 3.
_PLACES = tl.constexpr(2.0**23 + 0 + 16 * 2 + 256 * 1 + 4096 * 3)


@triton.jit
def _look_up(TABLE: tl.constexpr, cases):
    """The bytes of a table that the nibbles of `cases` (below 8) name."""
    LOW: tl.constexpr = TABLE & 0xFFFFFFFF
    HIGH: tl.constexpr = TABLE >> 32
    nothing = cases & 0
    return permute_bytes(nothing + LOW, nothing + HIGH, cases)


@triton.jit
def _above(a, b):
    """1.0 where a > b, else 0.0: one instruction where the compiler makes two."""
    if _INTERPRETING:
        return tl.where(a > b, 1.0, 0.0)
    else:
        return tl.inline_asm_elementwise(
            "set.gt.f32.f32 $0, $1, $2;", "=f,f,f", [a, b], tl.float32, True, 1
        )


@triton.jit
def _not_below(a, b):
    """1.0 where a >= b, else 0.0."""
    if _INTERPRETING:
        return tl.where(a >= b, 1.0, 0.0)
    else:
        return tl.inline_asm_elementwise(
            "set.ge.f32.f32 $0, $1, $2;", "=f,f,f", [a, b], tl.float32, True, 1
        )


@triton.jit
def _zero(a):
    """1.0 where a is 0, else 0.0."""
    if _INTERPRETING:
        return tl.where(a == 0.0, 1.0, 0.0)
    else:
        return tl.inline_asm_elementwise(
            "set.eq.f32.f32 $0, $1, 0f00000000;", "=f,f", [a], tl.float32, True, 1
        )


@triton.jit
def _not_above(a, b):
    """0.0 where a > b, else 1.0."""
    if _INTERPRETING:
        return tl.where(a > b, 0.0, 1.0)
    else:
        return tl.inline_asm_elementwise(
            "set.leu.f32.f32 $0, $1, $2;", "=f,f,f", [a, b], tl.float32, True, 1
        )


@triton.jit
def _bits(x):
    return x.to(tl.uint32, bitcast=True)


@triton.jit
def _magnitude(x):
    """|x|, left to the operations that read it, which take it for nothing."""
    if _INTERPRETING:
        return tl.abs(x)
    else:  # otherwise masked together with the widening of a 16-bit number: one operation more
        return tl.inline_asm_elementwise("abs.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def sample(x0, x1, x2, x3, word):
    """`reference.exact_magnitudes` of a group and a random word.

    Returns: step, most; the selectors of their bytes by rank (float32) and of ranks by place
    (uint32); the largest magnitude, and that one or 0 after: else `step` is the largest.
    """
    a0, a1, a2, a3 = _magnitude(x0), _magnitude(x1), _magnitude(x2), _magnitude(x3)
    smaller01, larger01 = smaller(a0, a1), larger(a0, a1)
    smaller23, larger23 = smaller(a2, a3), larger(a2, a3)
    middle, largest = smaller(larger01, larger23), larger(larger01, larger23)
    c1 = smaller01 + smaller23
    r = c1 + middle
    step = (r + smaller(largest, r)) * 0.5
    t = threshold(uniform24(word), step)
    most = larger(largest, step)
    # The first mark moves from the middle to the smaller of 2 and 3, and from there to the smaller
    # of 0 and 1; the second from the middle to the smaller of 2 and 3, or to the largest.
    ranks = tl.fma(_above(c1, t), 960.0, _RANKS)
    ranks = tl.fma(_above(smaller01, t), 60.0, ranks)
    ranks = tl.fma(_above(c1 - step, t), 960.0, ranks)
    last = _not_above(r - step, t)
    ranks = tl.fma(last, -11264.0, ranks)
    # Each winner moves its pair, and the larger one swaps the two last ranks wherever they are.
    winner0, winner2 = _not_below(a0, a1), _not_below(a2, a3)
    places = tl.fma(winner2, -7680.0, tl.fma(winner0, -30.0, _PLACES))
    swap = tl.fma(winner2, 3840.0, tl.fma(winner0, -15.0, 16.0 - 4096.0))
    places = tl.fma(_not_below(larger01, larger23), swap, places)
    return step, most, ranks, _bits(places), largest, last * largest


@triton.jit
def signs16(x0, x1, x2, x3):
    """The top bytes of a group of 16-bit numbers, in a uint32: the signs, and bits below them."""
    if _INTERPRETING:
        low = _top_byte(x0) | (_top_byte(x1) << 8)
        return low | (_top_byte(x2) << 16) | (_top_byte(x3) << 24)
    else:  # two neighbours at a time
        return tl.inline_asm_elementwise(
            "{ .reg .b32 low, high; prmt.b32 low, $2, $3, 0x7351; prmt.b32 high, $4, $5, 0x7351; "
            "prmt.b32 $0, low, high, 0x5410; prmt.b32 $1, low, high, 0x7632; }",
            "=r,=r,r,r,r,r",
            [x0, x1, x2, x3],
            dtype=tl.uint32,
            is_pure=True,
            pack=2,
        )


@triton.jit
def _top_byte(x):
    return x.to(tl.uint16, bitcast=True).to(tl.uint32) >> 8


@triton.jit
def signs_of_pairs(low, high):
    """The same from two numbers in each of two uint32."""
    return permute_bytes(low, high, (low & 0) + 0x7531)


@triton.jit
def _e4m3_pair(a, b):
    """Two positive float32 as e4m3, saturated, in the low half of a uint32; zero above."""
    if _INTERPRETING:
        bits = to_float8(tl.join(a, b), False).to(tl.uint8, bitcast=True).to(tl.uint32)
        low, high = tl.split(bits)
        return low | (high << 8)
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .b16 pair, zero; cvt.rn.satfinite.e4m3x2.f32 pair, $2, $1; mov.b16 zero, 0; "
            "mov.b32 $0, {pair, zero}; }",
            "=r,f,f",
            [a, b],
            dtype=tl.uint32,
            is_pure=True,
            pack=1,
        )


@triton.jit
def _in_places(two, ranks, places):
    """The bytes of `two`, those of `step` and of `most`, where their entries are; 0 elsewhere."""
    by_rank = permute_bytes(two, two, _bits(ranks))
    return permute_bytes(by_rank, by_rank, places)


@triton.jit
def _nonzero(word):
    """The top bit of each byte that is not zero; the bytes are below 0x80."""
    return (word + 0x7F7F7F7F) & 0x80808080


@triton.jit
def _case(nonzero, FIRST: tl.constexpr):
    """The first three of the top bits in a nibble, the second or the first; above them anything."""
    # Bits 7, 15, 23 to 32, 33, 34.
    place: tl.constexpr = (1 << 25) + (1 << 18) + (1 << 11)
    return tl.umulhi(nonzero, (nonzero & 0) + (place if FIRST else place << 4))


@triton.jit
def word8(sampled, signs, scale):
    """The group as e4m3 of what is kept, times `scale` (positive); the top bits of non-zeros."""
    step, most, ranks, places, _, _ = sampled
    word = _in_places(_e4m3_pair(step * scale, most * scale), ranks, places)
    return word | (signs & 0x80808080), _nonzero(word)


@triton.jit
def packed8(word0, nonzero0, word1, nonzero1):
    """Two groups packed: four bytes that are kept (uint32), and two codes (uint8)."""
    cases = _case(nonzero0, True) + _case(nonzero1, False)
    kept = permute_bytes(word0, word1, _look_up(_NIBBLES, cases) | 0x4400)
    codes = _look_up(_CODES, cases)
    if _INTERPRETING:
        code = (codes & 15) | ((codes >> 4) & 0xF0)
    else:
        code = tl.inline_asm_elementwise(
            "dp4a.u32.u32 $0, $1, 0x1001, 0;", "=r,r", [codes], tl.uint32, True, 1
        )
    return kept, code.to(tl.uint8)


@triton.jit
def packed16(sampled, signs, KIND: tl.constexpr):
    """A group packed: the two numbers of a 16-bit KIND that are kept (uint32), and its code."""
    step, most, ranks, places, largest, _ = sampled
    # Zeros count as such: `step` is one when three of four are, `most` when all are.
    ranks = tl.fma(_zero(step), 1024.0, tl.fma(_zero(largest), 3.0 * 4096, ranks))
    numbers = pair16(step, most, KIND)
    nothing = numbers & 0
    # Places hold the selectors of a number's two bytes: of zero 0, of `step` 0x54, of `most` 0x76.
    word = _in_places(nothing + 0x7654, ranks, places)
    case = _case(_nonzero(word), True)
    kept = _look_up(_NIBBLES, case)
    value = permute_bytes(nothing, numbers, permute_bytes(word, word, kept))
    sign = permute_bytes(signs, signs, kept)
    sign = permute_bytes(sign, sign, nothing + 0x1100)
    return value | (sign & 0x80008000), (_look_up(_CODES, case) & 15).to(tl.uint8)
