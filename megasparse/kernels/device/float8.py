"""Device functions: float32 to 8-bit floating point, saturated, one by one or a group of 4 a word.

The GPU's conversion rounds to nearest even and saturates by itself; the interpreter's does neither,
so there the numbers are put on the format's grid first.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megasparse.kernels.device.groups import first_token, larger
from megasparse.kernels.dispatch import INTERPRETING

_INTERPRETING = tl.constexpr(INTERPRETING)


@triton.jit
def _on_grid(v, E5M2: tl.constexpr):
    """Round float32 to the nearest number of the format, ties to even, saturated."""
    most: tl.constexpr = 57344.0 if E5M2 else 448.0
    dropped: tl.constexpr = 21 if E5M2 else 20  # bits of float32's mantissa
    smallest_normal: tl.constexpr = 2.0**-14 if E5M2 else 2.0**-6
    # float32's spacing there is that of the format's subnormal numbers: 2^-16, 2^-9.
    shift: tl.constexpr = 192.0 if E5M2 else 24576.0
    magnitude = tl.abs(v)
    magnitude = tl.where(magnitude > most, most, magnitude)  # NaN stays
    bits = magnitude.to(tl.int32, bitcast=True)
    half: tl.constexpr = (1 << (dropped - 1)) - 1
    normal = (bits + half + ((bits >> dropped) & 1)) & -(1 << dropped)
    subnormal = (magnitude + shift) - shift
    rounded = tl.where(magnitude < smallest_normal, subnormal, normal.to(tl.float32, bitcast=True))
    sign = v.to(tl.int32, bitcast=True) & -0x80000000
    rounded = (rounded.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    return tl.where(v == v, rounded, float("nan"))


@triton.jit
def to_float8(v, E5M2: tl.constexpr):
    """float32 as the bits (int8) of e5m2 or e4m3, saturated; NaN is 0x7F."""
    if _INTERPRETING:
        v = _on_grid(v, E5M2)
    if E5M2:
        bits = v.to(tl.float8e5).to(tl.int8, bitcast=True)
    else:
        bits = v.to(tl.float8e4nv).to(tl.int8, bitcast=True)
    if _INTERPRETING:
        bits = tl.where(v != v, 0x7F, bits).to(tl.int8)
    return bits


@triton.jit
def e4m3_word(a, b, c, d):
    """Four float32 as e4m3, saturated, in one uint32: the first in the lowest byte."""
    if _INTERPRETING:  # one conversion: operations cost time there, not elements
        bits = to_float8(tl.join(tl.join(a, b), tl.join(c, d)), False).to(tl.uint8, bitcast=True)
        ac, bd = tl.split(tl.permute(bits, (0, 1, 3, 2)).to(tl.uint32))
        a, c = tl.split(ac)
        b, d = tl.split(bd)
        return a | (b << 8) | (c << 16) | (d << 24)
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f32 low, $2, $1; "
            "cvt.rn.satfinite.e4m3x2.f32 high, $4, $3; mov.b32 $0, {low, high}; }",
            "=r,f,f,f,f",
            [a, b, c, d],
            dtype=tl.uint32,
            is_pure=True,
            pack=1,
        )


@triton.jit
def product_factor(a_ptr, b_ptr, applied_inv):
    """What a product still lacks (`kernels/factors.py`); 1 where it lacks nothing."""
    if a_ptr is None:
        return 1.0
    else:
        return tl.load(a_ptr) * applied_inv * tl.load(b_ptr)


@triton.jit
def raise_amax(amax, magnitude):
    """Raise the float32 at `amax`, given as an int32 pointer, to the largest of `magnitude`.

    Magnitudes (float32, or int32 bits) are ordered like their bits, NaN above all. Most programs
    find it high enough.
    """
    raise_above(amax, magnitude, tl.load(amax))


@triton.jit
def raise_above(amax, magnitude, before):
    """The same with what was found at `amax` earlier, when a load was cheap."""
    bits = tl.max(magnitude.to(tl.int32, bitcast=True))
    tl.atomic_max(amax, bits, mask=bits > before, sem="relaxed")


@triton.jit
def largest_of_four(a, b, c, d):
    """The largest magnitude of four, entry by entry; NaN is the largest."""
    return larger(larger(tl.abs(a), tl.abs(b)), larger(tl.abs(c), tl.abs(d)))


@triton.jit
def store_operands(
    a,
    b,
    c,
    d,
    rows_ptr,
    columns_ptr,
    first_group,
    first_channel,
    width,
    padded_tokens,
    STRIDED: tl.constexpr,
    GROUPS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Store float32 as e4m3, row-major and (unless `columns_ptr` is None) transposed.

    a, b, c, d: (GROUPS, CHANNELS), the four tokens of each group; they exist in both results.
    rows_ptr: int8 (T', width); columns_ptr: int32 (width, T' / 4). width: int64.

    What moves between threads for the transposed copy are words of four tokens. With STRIDED
    groups the four are a quarter of all tokens apart, and side by side in the transposed copy.
    """
    group = first_group + tl.arange(0, GROUPS)[:, None]
    channel = first_channel + tl.arange(0, CHANNELS)[None, :]
    out = rows_ptr + first_token(group, STRIDED) * width + channel
    stride = width * (padded_tokens // 4) if STRIDED else width
    tl.store(out, to_float8(a, False))
    tl.store(out + stride, to_float8(b, False))
    tl.store(out + 2 * stride, to_float8(c, False))
    tl.store(out + 3 * stride, to_float8(d, False))
    if columns_ptr is not None:
        word = e4m3_word(a, b, c, d).to(tl.int32, bitcast=True)
        row = tl.cast(first_channel, tl.int64) + tl.arange(0, CHANNELS)[:, None]
        column = first_group + tl.arange(0, GROUPS)[None, :]
        tl.store(columns_ptr + row * (padded_tokens // 4) + column, tl.trans(word))


@triton.jit
def words_of_part(columns_ptr, parts_ptr, tile, width):
    """Of parts whose transposed copies lie one after the other: what to give to `store_operands`
    for a tile of rows, as the columns and as their number.

    parts_ptr: int64 (tiles, 2), the first row of each tile's part, and its rows.
    """
    begin, length = tl.load(parts_ptr + 2 * tile), tl.load(parts_ptr + 2 * tile + 1)
    return columns_ptr + (width - 1) * (begin // 4), length
