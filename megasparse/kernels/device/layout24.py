"""Device functions for the packed layout: groups of 4 as words, and where their codes lie.

A group is a word: four bytes in a uint32, or four 16-bit numbers in a uint64. Which two entries are
kept depends on which of the four are non-zero: sixteen cases, looked up in a 64-bit constant.

Kernels that write both orientations hold 8 x 4 entries, two 4x4 blocks one above the other, at one
place (p, C) of their tensors: rows 8 p + b, columns 4 C + j. The codes of its eight groups along
the rows are the nibbles b of a uint32; those of its eight groups along the columns, the rows of the
transpose, are the nibbles 4 * block + j. Addresses and their letters are those of packed24.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megasparse.kernels.device.float8 import e4m3_word
from megasparse.kernels.device.groups import pair16, permute_bytes, to_fp32
from megasparse.kernels.dispatch import INTERPRETING

_INTERPRETING = tl.constexpr(INTERPRETING)


def _code(case: int) -> int:
    """The metadata code of a group whose non-zeros are the bits of `case`."""
    last = case >> 3 & 1 or (case & 7) in (0, 1, 2, 4)
    first = 0 if case & 1 else 1 if case & 2 else 2
    return first | (3 if last else 2 if case & 4 else 1) << 2


def _table(order: tuple[int, ...]) -> int:
    """The codes, 4 bits each; bit k of a case, as it is numbered there, is entry order[k]'s."""
    table = 0
    for number in range(16):
        case = sum((number >> bit & 1) << entry for bit, entry in enumerate(order))
        table |= _code(case) << 4 * number
    return table


_CODES8 = tl.constexpr(_table((0, 1, 2, 3)))
_CODES16 = tl.constexpr(_table((2, 0, 3, 1)))


@triton.jit
def _look_up(TABLE: tl.constexpr, shift):
    """The 4 bits of a 64-bit constant that lie `shift` (2-D, uint32) above its end."""
    return (tl.full((1, 1), TABLE, tl.uint64) >> shift.to(tl.uint64)).to(tl.uint32) & 15


@triton.jit
def to_word(a, b, c, d, scale, OUT: tl.constexpr):
    """Four float32, times `scale` for e4m3, as a word of OUT's."""
    if OUT == "e4m3":
        return e4m3_word(a * scale, b * scale, c * scale, d * scale)
    else:
        low, high = pair16(a, b, OUT), pair16(c, d, OUT)
        return low.to(tl.uint64) | (high.to(tl.uint64) << 32)


@triton.jit
def word_of(a, b, c, d):
    """The word of four 16-bit numbers that are bits as in `device.groups`."""
    low, high = (a >> 16) & 0xFFFF | (b & -0x10000), (c >> 16) & 0xFFFF | (d & -0x10000)
    low, high = low.to(tl.uint32, bitcast=True), high.to(tl.uint32, bitcast=True)
    return low.to(tl.uint64) | (high.to(tl.uint64) << 32)


@triton.jit
def nans_of(word, OUT: tl.constexpr):
    """A uint32 that has one of `nan_bits` if the word holds a NaN; others may be set anyway."""
    if OUT == "e4m3":
        return (word & 0x7F7F7F7F) + 0x01010101
    else:
        above: tl.constexpr = 0x007F007F if OUT == "bf16" else 0x03FF03FF
        low, high = word.to(tl.uint32), (word >> 32).to(tl.uint32)
        return ((low & 0x7FFF7FFF) + above) | ((high & 0x7FFF7FFF) + above)


@triton.jit
def nan_bits(OUT: tl.constexpr):
    """See `nans_of`."""
    bits: tl.constexpr = 0x80808080 if OUT == "e4m3" else 0x80008000
    return bits


@triton.jit
def masked_word(word, kept, OUT: tl.constexpr):
    """`word` without the entries whose byte in `kept` is 0. After the conversion: one operation."""
    if OUT == "e4m3":
        return word & (kept * 0xFF)
    else:
        if _INTERPRETING:
            low = (kept & 1) * 0xFFFF + (kept & 0x100) * 0xFFFF00
            high = ((kept >> 16) & 1) * 0xFFFF + ((kept >> 16) & 0x100) * 0xFFFF00
        else:
            kept = kept * 0xFF
            low, high = permute_bytes(kept, kept, 0x1100), permute_bytes(kept, kept, 0x3322)
        return word & (low.to(tl.uint64) | (high.to(tl.uint64) << 32))


@triton.jit
def amax_of(word, KIND: tl.constexpr):
    """The largest magnitude, float32, of the four 16-bit numbers of a word."""
    low, high = word.to(tl.uint32) & 0x7FFF7FFF, (word >> 32).to(tl.uint32) & 0x7FFF7FFF
    # The upper one of two decides; what is below it does not matter.
    most = tl.maximum(tl.maximum(low, low << 16), tl.maximum(high, high << 16)) & 0xFFFF0000
    return to_fp32(most.to(tl.int32, bitcast=True), KIND)


@triton.jit
def _nonzero8(word):
    """The top bit of each byte that is not zero without its sign."""
    return ((word & 0x7F7F7F7F) + 0x7F7F7F7F) & 0x80808080


@triton.jit
def crowded8(word):
    """uint32 whose top bit is set where more than two bytes of a uint32 are non-zero."""
    return (_nonzero8(word) >> 7) * 0x01010101 + 0x7D000000  # the top byte counts


@triton.jit
def select8(word):
    """The kept two bytes of a uint32, in the low half of another whose high half is anything, and
    their code.

    Multiplications gather bits: they run beside the logic, whose units are the busy ones.
    """
    # The four bits together, from bit 28 on.
    code = _look_up(_CODES8, (_nonzero8(word) * 0x00204081) >> 26)
    if _INTERPRETING:
        first, second = (word >> ((code & 3) * 8)) & 0xFF, (word >> ((code >> 2) * 8)) & 0xFF
        kept = first | (second << 8)
    else:
        kept = permute_bytes(word, word, code + (code & 12) * 3)
    return kept, code


@triton.jit
def _nonzero16(low, high):
    """Bits 15, 31, 14, 30 where entries 0, 1, 2, 3 are not zero without their signs."""
    nonzero = ((low & 0x7FFF7FFF) + 0x7FFF7FFF) & 0x80008000
    return nonzero | ((((high & 0x7FFF7FFF) + 0x7FFF7FFF) >> 1) & 0x40004000)


@triton.jit
def crowded16(word):
    """uint32 whose top bit is set where more than two 16-bit numbers of a uint64 are non-zero."""
    nonzero = _nonzero16(word.to(tl.uint32), (word >> 32).to(tl.uint32)) >> 14
    # Counts of up to two in bits 0 and 16, together in bits 16 to 18.
    count = ((nonzero & 0x10001) + ((nonzero >> 1) & 0x10001)) * 0x10001
    return (((count >> 16) & 7) + 5) << 28  # three make eight


@triton.jit
def select16(word):
    """The kept two of the four 16-bit numbers of a uint64, as a uint32, and their code."""
    low, high = word.to(tl.uint32), (word >> 32).to(tl.uint32)
    nonzero = _nonzero16(low, high)
    # Entries 0, 1, 2, 3 at bits 15, 31, 14, 30: then at 29, 31, 28, 30.
    code = _look_up(_CODES16, (nonzero * 0x4001) >> 26)
    if _INTERPRETING:
        first = (word >> ((code & 3) * 16).to(tl.uint64)).to(tl.uint32) & 0xFFFF
        second = (word >> ((code >> 2) * 16).to(tl.uint64)).to(tl.uint32)
        kept = first | (second << 16)
    else:  # bytes 2 i0, 2 i0 + 1, 2 i1, 2 i1 + 1
        kept = permute_bytes(low, high, code * 0x22 + (code & 12) * (0x880 - 0x22) + 0x1010)
    return kept, code


@triton.jit
def select(word, OUT: tl.constexpr):
    """`select8` or `select16`."""
    if OUT == "e4m3":
        return select8(word)
    else:
        return select16(word)


@triton.jit
def _column_of(r0, r1, r2, r3, J: tl.constexpr):
    """Column J of a 4x4 block whose rows are words, as such a word."""
    BITS: tl.constexpr = r0.dtype.primitive_bitwidth // 4
    ONE: tl.constexpr = (1 << BITS) - 1
    SHIFT: tl.constexpr = J * BITS
    c0, c1 = (r0 >> SHIFT) & ONE, ((r1 >> SHIFT) & ONE) << BITS
    c2, c3 = ((r2 >> SHIFT) & ONE) << (2 * BITS), ((r3 >> SHIFT) & ONE) << (3 * BITS)
    return (c0 | c1) | (c2 | c3)


@triton.jit
def columns_of(r0, r1, r2, r3):
    """The four columns of a 4x4 block whose rows are words, as words."""
    if r0.dtype.primitive_bitwidth == 32 and not _INTERPRETING:
        # Bytes 0 and 1, then 2 and 3, of two rows in turn.
        t0, t1 = permute_bytes(r0, r1, 0x5140), permute_bytes(r2, r3, 0x5140)
        t2, t3 = permute_bytes(r0, r1, 0x7362), permute_bytes(r2, r3, 0x7362)
        return (
            permute_bytes(t0, t1, 0x5410),
            permute_bytes(t0, t1, 0x7632),
            permute_bytes(t2, t3, 0x5410),
            permute_bytes(t2, t3, 0x7632),
        )
    else:
        return (
            _column_of(r0, r1, r2, r3, 0),
            _column_of(r0, r1, r2, r3, 1),
            _column_of(r0, r1, r2, r3, 2),
            _column_of(r0, r1, r2, r3, 3),
        )


@triton.jit
def join4(x0, x1, x2, x3):
    """(..., 2, 2), flat along the last two: x0, x1, x2, x3."""
    return tl.join(tl.join(x0, x2), tl.join(x1, x3))


@triton.jit
def _bytes(word):
    """The bytes of a uint32: (..., 2, 2) uint8."""
    return join4(
        word.to(tl.uint8),
        (word >> 8).to(tl.uint8),
        (word >> 16).to(tl.uint8),
        (word >> 24).to(tl.uint8),
    )


@triton.jit
def _nibbles(word):
    """The nibbles of a uint32: (..., 2, 2, 2) uint8."""
    return tl.join(_bytes(word & 0x0F0F0F0F), _bytes((word >> 4) & 0x0F0F0F0F))


@triton.jit
def _spread(nibbles):
    """The four nibbles of a uint32 below 2^16 to the low halves of its four bytes."""
    nibbles = (nibbles | (nibbles << 8)) & 0x00FF00FF
    return (nibbles | (nibbles << 4)) & 0x0F0F0F0F


@triton.jit
def row_metadata(codes, BITS: tl.constexpr, COLUMNS: tl.constexpr):
    """(8 * COLUMNS,) uint8 of 64 rows: from (8, COLUMNS / 4) codes along the rows."""
    GROUPS: tl.constexpr = COLUMNS // 4
    if BITS == 8:
        nibble = tl.reshape(_nibbles(codes), (4, 2, GROUPS // 16, 2, 4, 2, 8))
        # (a, h, G, g8, gq, gn, b) -> (G, a, b, gq, g8, h, gn)
        nibble = tl.permute(nibble, (2, 0, 6, 4, 3, 1, 5))
    else:
        nibble = tl.reshape(_nibbles(codes), (4, 2, GROUPS // 8, 2, 4, 8))
        # (a, h, G, gh, gl, b) -> (G, a, b, gl, gh, h)
        nibble = tl.permute(nibble, (2, 0, 5, 4, 3, 1))
    low, high = tl.split(tl.reshape(nibble, (8 * COLUMNS, 2)))
    return low | (high << 4)


@triton.jit
def column_metadata(codes, BITS: tl.constexpr, COLUMNS: tl.constexpr):
    """(COLUMNS / 64, 512) uint8: for each 64 rows of the transpose, those of 64 of its columns.

    codes: (8, COLUMNS / 4), along the columns.
    """
    BLOCKS: tl.constexpr = COLUMNS // 64
    if BITS == 8:
        word = _spread(codes & 0xFFFF) | (_spread(codes >> 16) << 4)
        byte = tl.reshape(_bytes(word), (2, 4, BLOCKS, 4, 2, 2, 4))
        # (g8, gq, block, a, h, b: 2, b: 4) -> (block, a, b, gq, g8, h)
        byte = tl.permute(byte, (2, 3, 5, 6, 1, 0, 4))
    else:
        nibble = tl.reshape(_nibbles(codes), (2, 2, 2, BLOCKS, 4, 2, 2, 2, 4))
        # (G, gh, gl: 2, block, a, h, b: 2, gl: 2, b: 4) -> (block, G, a, b, gl, gh, h)
        nibble = tl.permute(nibble, (3, 0, 4, 6, 8, 2, 7, 1, 5))
        low, high = tl.split(tl.reshape(nibble, (BLOCKS * 512, 2)))
        byte = low | (high << 4)
    return tl.reshape(byte, (BLOCKS, 512))
