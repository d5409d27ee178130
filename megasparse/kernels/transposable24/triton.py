"""The exact search over the 90 transposable patterns, one 4x4 block per lane, in registers.

Pairs of columns are numbered 0 to 5 as in `patterns.PAIRS`; the pair 5 - p keeps the columns that p
does not. When rows 0 and 1 keep the pairs p and q, rows 2 and 3 can keep
  - any pair r and its complement, if q = 5 - p (6 patterns);
  - otherwise the pairs 5 - p and 5 - q in either order (one pattern if p = q, else two).
So 36 choices (p, q) remain, each with the best score that rows 2 and 3 give it. fp32 addition is
monotonic, hence `max over bottoms of fl(top + bottom) = fl(top + max bottom)` and 36 compares find
the best score and the first (p, q) that reaches it. Which bottom is the *first* to reach it is
decided once, for the winner, by comparing rounded sums: the same answer as scanning all 90.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megasparse.kernels.device.groups import load_bits, magnitude, raise_flag, to_fp32
from megasparse.kernels.launches import KINDS, Launch, Launches, group_words

# In 4x4 blocks. Narrow: 2 a thread, 16-byte loads; more would cost too many registers.
LAUNCHES = Launches(wide=Launch(block=128, num_warps=4), narrow=Launch(block=256, num_warps=4))
# The pairs as bits, lowest bit first column: 1100, 1010, 1001, 0110, 0101, 0011.
_NIBBLES = tl.constexpr((0b0011, 0b0101, 0b1001, 0b0110, 0b1010, 0b1100))


@triton.jit
def _pair_sums(w, group, live, KIND: tl.constexpr):
    a, b, c, d = load_bits(w, group, live, KIND)
    a, b = to_fp32(magnitude(a), KIND), to_fp32(magnitude(b), KIND)
    c, d = to_fp32(magnitude(c), KIND), to_fp32(magnitude(d), KIND)
    return a + b, a + c, a + d, b + c, b + d, c + d


@triton.jit
def _best_below(top, row2, row3, any_best, P: tl.constexpr, Q: tl.constexpr):
    """For rows 0 and 1 = pairs P and Q: best score, score of the first bottom, packed patterns."""
    # The smaller pair number, the greater bit string, comes first.
    i: tl.constexpr = 5 - (P if P > Q else Q)
    j: tl.constexpr = 5 - (Q if P > Q else P)
    packed: tl.constexpr = _NIBBLES[P] | _NIBBLES[Q] << 4 | _NIBBLES[i] << 8 | _NIBBLES[j] << 12
    if P + Q == 5:
        return top + any_best, top, packed | 1 << 16
    elif P == Q:
        score = top + (row2[i] + row3[i])
        return score, score, packed
    else:
        bottom = row2[i] + row3[j]
        return top + tl.maximum(bottom, row2[j] + row3[i]), top + bottom, packed


@triton.jit
def _first_best(row0, row1, row2, row3):
    """Pair sums of the four rows -> the kept pairs of rows 0, 1 and 2 as 4-bit masks."""
    # Rows 2 and 3 complementary: any of six.
    any_best = row2[0] + row3[5]
    for r in tl.static_range(1, 6):
        any_best = tl.maximum(any_best, row2[r] + row3[5 - r])
    best = tl.zeros_like(any_best) - 1.0
    first = best  # the winner's score with its first bottom; if complementary, its top alone
    code = tl.zeros_like(any_best).to(tl.int32)
    for p in tl.static_range(6):
        for q in tl.static_range(6):
            top = row0[p] + row1[q]
            score, candidate, packed = _best_below(top, row2, row3, any_best, p, q)
            better = score > best
            best = tl.maximum(best, score)
            first = tl.where(better, candidate, first)
            code = tl.where(better, packed, code)
    third = tl.where(first == best, code >> 8, code >> 12) & 15
    any_third = tl.zeros_like(code)
    for r in tl.static_range(5, -1, -1):
        reaches = first + (row2[r] + row3[5 - r]) == best
        any_third = tl.where(reaches, _NIBBLES[r], any_third)
    third = tl.where(code >> 16 != 0, any_third, third)
    return code & 15, (code >> 4) & 15, third


@triton.jit
def _as_bytes(nibble):
    """Bit k of a 4-bit mask to byte k of an int32."""
    return (nibble * 0x00204081) & 0x01010101


@triton.jit
def _transposable24_kernel(
    w,
    mask,
    flag,
    block_rows,
    block_cols,
    col_tiles,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    pid = tl.program_id(0)
    row = (pid // col_tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    col = (pid % col_tiles) * COLS + tl.arange(0, COLS)[None, :]
    live = (row < block_rows) & (col < block_cols)
    # Groups of the block's four rows.
    group0 = row * 4 * block_cols + col
    group1 = group0 + block_cols
    group2 = group1 + block_cols
    group3 = group2 + block_cols
    row0 = _pair_sums(w, group0, live, KIND)
    row1 = _pair_sums(w, group1, live, KIND)
    row2 = _pair_sums(w, group2, live, KIND)
    row3 = _pair_sums(w, group3, live, KIND)
    # A sum of magnitudes is NaN only if one of them is.
    upper = (row0[0] + row0[5]) + (row1[0] + row1[5])
    total = upper + ((row2[0] + row2[5]) + (row3[0] + row3[5]))
    raise_flag(flag, (total != total).to(tl.int32))
    first, second, third = _first_best(row0, row1, row2, row3)
    word0, word1, word2 = _as_bytes(first), _as_bytes(second), _as_bytes(third)
    tl.store(mask + group0, word0, mask=live)
    tl.store(mask + group1, word1, mask=live)
    tl.store(mask + group2, word2, mask=live)
    # Every column has two ones: the last row has one where the others have an odd number.
    tl.store(mask + group3, word0 ^ word1 ^ word2, mask=live)


def transposable24(w: torch.Tensor, flag: torch.Tensor) -> torch.Tensor:
    """`reference.transposable24`; sets `flag` (int32, 1 element) to 1 when `w` holds a NaN."""
    mask = torch.empty(w.shape, dtype=torch.bool, device=w.device)
    if mask.numel() == 0:
        return mask
    block_rows, block_cols = w.shape[0] // 4, w.shape[1] // 4
    launch = LAUNCHES.pick(w)
    cols = min(launch.block, triton.next_power_of_2(block_cols))
    rows = launch.block // cols
    col_tiles = triton.cdiv(block_cols, cols)
    _transposable24_kernel[(triton.cdiv(block_rows, rows) * col_tiles,)](
        group_words(w),
        mask.view(-1).view(torch.int32),
        flag,
        block_rows,
        block_cols,
        col_tiles,
        KIND=KINDS[w.dtype],
        ROWS=rows,
        COLS=cols,
        num_warps=launch.num_warps,
    )
    return mask
