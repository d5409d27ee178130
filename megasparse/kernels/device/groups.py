"""Functions on groups of 4 entries, one group per lane.

A group is loaded as one or two integers, so that its four entries sit in one thread whatever layout
Triton picks: no shuffle and no shared memory, and loads of up to 16 bytes. An entry becomes an
int32 that holds its bits at the top, zeros below ("bits" here): the sign is bit 31 for every type,
bf16 is its own fp32 value, and the bits without the sign are ordered as the magnitudes. Everything
works on integers or exactly converted fp32, which is also right in the interpreter.

KIND names the entries: "fp32", "bf16", "fp16", "e4m3" or "bool".
"""

from __future__ import annotations

import triton
import triton.language as tl

from megasparse.kernels.dispatch import INTERPRETING

_INTERPRETING = tl.constexpr(INTERPRETING)


@triton.jit
def first_token(group, STRIDED: tl.constexpr):
    """int64: the first token of each group; the next are a step further each (`token_order.py`)."""
    return group.to(tl.int64) if STRIDED else group.to(tl.int64) * 4


@triton.jit
def load_bits(words, group, live, KIND: tl.constexpr):
    """The bits of a group's entries: four int32 tensors, zero where `live` is False.

    words: pointer from `launches.group_words`; group: int64 tensor of group numbers.
    """
    if KIND == "fp32":
        # Both integers in one 16-byte load; with one group a thread the split is free.
        halves = 2 * group.expand_dims(-1) + tl.arange(0, 2)
        x, y = tl.split(tl.load(words + halves, mask=live.expand_dims(-1), other=0))
        a, b = x.to(tl.int32), (x >> 32).to(tl.int32)
        c, d = y.to(tl.int32), (y >> 32).to(tl.int32)
    elif KIND == "bf16" or KIND == "fp16":
        x = tl.load(words + group, mask=live, other=0)
        low, high = x.to(tl.int32), (x >> 32).to(tl.int32)
        a, b = low << 16, low & -0x10000
        c, d = high << 16, high & -0x10000
    else:
        x = tl.load(words + group, mask=live, other=0)
        a, b = x << 24, (x << 16) & -0x1000000
        c, d = (x << 8) & -0x1000000, x & -0x1000000
    return a, b, c, d


@triton.jit
def store_bits(words, group, live, a, b, c, d, KIND: tl.constexpr):
    """Store bits as groups of a 32- or 16-bit KIND; what is below the top 16 is dropped."""
    if KIND == "fp32":
        halves = 2 * group.expand_dims(-1) + tl.arange(0, 2)
        tl.store(words + halves, tl.join(_int64(a, b), _int64(c, d)), mask=live.expand_dims(-1))
    else:
        low, high = ((a >> 16) & 0xFFFF) | (b & -0x10000), ((c >> 16) & 0xFFFF) | (d & -0x10000)
        tl.store(words + group, _int64(low, high), mask=live)


@triton.jit
def _int64(low, high):
    return (low.to(tl.int64) & 0xFFFFFFFF) | (high.to(tl.int64) << 32)


@triton.jit
def smaller(a, b):
    """The smaller of two floats; NaN where one is."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def larger(a, b):
    """The larger of two floats; NaN where one is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def magnitude(bits):
    """Bits without the sign: ordered as |x|, zero for both zeros."""
    return bits & 0x7FFFFFFF


@triton.jit
def nan_limit(KIND: tl.constexpr):
    """Magnitudes above this are NaN."""
    limit: tl.constexpr = (
        0x7E000000 if KIND == "e4m3" else (0x7C000000 if KIND == "fp16" else 0x7F800000)
    )
    return limit


@triton.jit
def to_fp32(bits, KIND: tl.constexpr):
    """Bits to the fp32 value, exactly. "e4m3" takes a magnitude."""
    if KIND == "fp32" or KIND == "bf16":
        return bits.to(tl.float32, bitcast=True)
    elif KIND == "fp16":
        return (bits >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        # As fp16 bits with the exponent 8 too low; E4M3 has one NaN and no infinity.
        value = (bits >> 17).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        return tl.where(bits > nan_limit(KIND), float("nan"), value)


@triton.jit
def from_fp32(x, KIND: tl.constexpr):
    """An fp32 value, not NaN, to bits, rounded to nearest even; not zero below the top."""
    if KIND == "fp32":
        return x.to(tl.int32, bitcast=True)
    elif KIND == "bf16":
        bits = x.to(tl.int32, bitcast=True)
        return bits + 0x7FFF + ((bits >> 16) & 1)  # by hand: the interpreter truncates
    else:
        return x.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) << 16


@triton.jit
def widen(x):
    """Floats as float32; bf16 by its bits, for the interpreter does not keep every NaN."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def rounded(x, KIND: tl.constexpr):
    """An fp32 value, not NaN, rounded to nearest even as a number of KIND."""
    if KIND == "fp32":
        return x
    elif KIND == "fp16":
        return x.to(tl.float16).to(tl.float32)
    elif _INTERPRETING:  # it truncates
        return (from_fp32(x, KIND) & -0x10000).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.bfloat16).to(tl.float32)


@triton.jit
def pair16(low, high, KIND: tl.constexpr):
    """Two fp32 values rounded to nearest even as numbers of a 16-bit KIND, in a uint32.

    One instruction: the GPU converts single values at a quarter of the rate.
    """
    if _INTERPRETING and KIND == "bf16":  # its conversion truncates
        low_bits = from_fp32(low, KIND).to(tl.uint32, bitcast=True) >> 16
        pair = low_bits | (from_fp32(high, KIND).to(tl.uint32, bitcast=True) & 0xFFFF0000)
    elif _INTERPRETING:
        low_bits = low.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)
        pair = low_bits | (high.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32) << 16)
    else:
        bf16: tl.constexpr = "cvt.rn.bf16x2.f32 $0, $2, $1;"
        fp16: tl.constexpr = "cvt.rn.f16x2.f32 $0, $2, $1;"
        pair = tl.inline_asm_elementwise(
            bf16 if KIND == "bf16" else fp16,
            "=r,f,f",
            [low, high],
            dtype=tl.uint32,
            is_pure=True,
            pack=1,
        )
    return pair


@triton.jit
def permute_bytes(low, high, selector):
    """PTX's `prmt`: of the eight bytes of `low` and `high` the four that the nibbles name.

    A nibble above 7 names the sign of a byte, all over the byte.
    """
    if _INTERPRETING:
        both = low.to(tl.uint64) | (high.to(tl.uint64) << 32)
        result = low & 0
        selector = result + selector  # which may be a number
        for i in tl.static_range(4):
            nibble = (selector >> (4 * i)) & 15
            byte = (both >> ((nibble & 7) * 8).to(tl.uint64)).to(tl.uint32) & 0xFF
            byte = tl.where(nibble > 7, (byte >> 7) * 0xFF, byte)
            result = result | (byte << (8 * i))
        return result
    else:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;",
            "=r,r,r,r",
            [low, high, selector],
            dtype=tl.uint32,
            is_pure=True,
            pack=1,
        )


@triton.jit
def rounded_pair(low, high, KIND: tl.constexpr):
    """Two fp32 values, not NaN, rounded to nearest even as numbers of KIND."""
    if KIND == "fp32":
        return low, high
    else:
        pair = pair16(low, high, KIND).to(tl.int32, bitcast=True)
        return to_fp32(pair << 16, KIND), to_fp32(pair & -0x10000, KIND)


@triton.jit
def raise_flag(flag, found):
    """Set the int32 at `flag` to 1 if any entry of `found` (int32) is not 0.

    Reduced first: a store of one word by many lanes would pull `found` through shared memory. All
    programs store the same word, so no atomic is needed.
    """
    tl.store(flag, 1, mask=tl.max(found) != 0)
