"""Triton kernels of `mvue24`: bit for bit the numbers of reference.py.

One pass: a thread loads 16 bytes (eight 16-bit gradients) at a time, holds whole groups of four in
registers and draws one Philox block for each. Groups along the rows in memory read four rows of
the same channels, so both kernels read and write coalesced. Fused multiply-adds are off: the
definition rounds every product and sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from megasparse.kernels.dispatch import INTERPRETING
from megasparse.kernels.mvue24.reference import SUM_LIMIT
from megasparse.kernels.random import (
    PHILOX_MULTIPLIER,
    PHILOX_ROUNDS,
    PHILOX_WEYL,
    SeedLike,
    seed_words,
)

_ROUNDS = tl.constexpr(PHILOX_ROUNDS)
_MULTIPLIER = tl.constexpr(PHILOX_MULTIPLIER)
_WEYL = tl.constexpr(PHILOX_WEYL)
_SUM_LIMIT = tl.constexpr(SUM_LIMIT)


@dataclass(frozen=True)
class Launch:
    """A tile of `rows` x `columns`, counted in groups along the grouped dimension."""

    rows: int
    columns: int
    num_warps: int


# Groups along rows: 8 groups of 4 rows a thread; along columns: 4 groups a thread.
ALONG_ROWS = Launch(rows=4, columns=256, num_warps=4)
ALONG_COLUMNS = Launch(rows=2, columns=256, num_warps=4)
# The interpreter costs time per program, not per element.
INTERPRETED = Launch(rows=64, columns=256, num_warps=4)


@triton.jit
def philox2x32(x0, x1, key):
    """Philox2x32 on uint32 counters (any shapes that broadcast) and a uint32 key."""
    for _ in tl.static_range(_ROUNDS):
        product = x0.to(tl.uint64) * _MULTIPLIER
        x0 = (product >> 32).to(tl.uint32) ^ key ^ x1
        x1 = product.to(tl.uint32)
        key = key + _WEYL
    return x0, x1


@triton.jit
def _uniform24(word):
    return (word >> 8).to(tl.int32).to(tl.float32) * (2.0**-24)


@triton.jit
def _threshold(u, total):
    below = tl.maximum(total.to(tl.int32, bitcast=True), 1) - 1
    return tl.minimum(u * total, below.to(tl.float32, bitcast=True))


@triton.jit
def _signed(keep, magnitude, x):
    return tl.where(keep, tl.where(x < 0, -magnitude, magnitude), 0.0)


@triton.jit
def _exact(x0, x1, x2, x3, word):
    a0, a1, a2, a3 = tl.abs(x0), tl.abs(x1), tl.abs(x2), tl.abs(x3)
    low, high = a0 + a1, a2 + a3
    d0, d1 = a0 > a1 + high, a1 > a0 + high
    d2, d3 = a2 > low + a3, a3 > low + a2
    c0 = tl.where(d0, 0.0, a0)
    c1 = c0 + tl.where(d1, 0.0, a1)
    c2 = c1 + tl.where(d2, 0.0, a2)
    c3 = c2 + tl.where(d3, 0.0, a3)
    step = tl.where(d0 | d1 | d2 | d3, c3, c3 * 0.5)
    t = _threshold(_uniform24(word), step)
    # The c ascend, so "the first above t" is where the comparison changes.
    f0, f1, f2, f3 = c0 > t, c1 > t, c2 > t, c3 > t
    s0, s1, s2, s3 = c0 - step > t, c1 - step > t, c2 - step > t, c3 - step > t
    o0 = _signed(d0 | f0 | s0, tl.where(d0, a0, step), x0)
    o1 = _signed(d1 | (f1 ^ f0) | (s1 ^ s0), tl.where(d1, a1, step), x1)
    o2 = _signed(d2 | (f2 ^ f1) | (s2 ^ s1), tl.where(d2, a2, step), x2)
    o3 = _signed(d3 | (f3 ^ f2) | (s3 ^ s2), tl.where(d3, a3, step), x3)
    return o0, o1, o2, o3


@triton.jit
def _approximate(x0, x1, x2, x3, word0, word1):
    a0, a1, a2, a3 = tl.abs(x0), tl.abs(x1), tl.abs(x2), tl.abs(x3)
    c1 = a0 + a1
    c2 = c1 + a2
    total = c2 + a3
    t = _threshold(_uniform24(word0), total)
    above0, above1, above2, above3 = a0 > t, c1 > t, c2 > t, total > t
    f0, f1, f2, f3 = above0, above1 ^ above0, above2 ^ above1, above3 ^ above2
    e0 = tl.where(f0, 0.0, a0)
    e1 = e0 + tl.where(f1, 0.0, a1)
    e2 = e1 + tl.where(f2, 0.0, a2)
    e3 = e2 + tl.where(f3, 0.0, a3)
    t = _threshold(_uniform24(word1), e3)
    above0, above1, above2, above3 = e0 > t, e1 > t, e2 > t, e3 > t
    s0, s1, s2, s3 = above0, above1 ^ above0, above2 ^ above1, above3 ^ above2
    low, high = c1, a2 + a3
    q0, q1 = tl.div_rn(a0, a1 + high), tl.div_rn(a1, a0 + high)
    q2, q3 = tl.div_rn(a2, low + a3), tl.div_rn(a3, low + a2)
    # Two of the four magnitudes are used: select first, divide twice.
    low, high = q0 + q1, q2 + q3
    r0, r1, r2, r3 = q1 + high, q0 + high, low + q3, low + q2
    first = tl.div_rn(total, 1.0 + tl.where(f0, r0, tl.where(f1, r1, tl.where(f2, r2, r3))))
    second = tl.div_rn(total, 1.0 + tl.where(s0, r0, tl.where(s1, r1, tl.where(s2, r2, r3))))
    o0 = _signed(f0 | s0, tl.where(f0, first, second), x0)
    o1 = _signed(f1 | s1, tl.where(f1, first, second), x1)
    o2 = _signed(f2 | s2, tl.where(f2, first, second), x2)
    o3 = _signed(f3 | s3, tl.where(f3, first, second), x3)
    return o0, o1, o2, o3


@triton.jit
def _sample(x0, x1, x2, x3, group, other, seed_ptr, key, high, EXACT: tl.constexpr):
    """The four entries of each group after pruning; `group` and `other` are uint32 counters."""
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
        key = seed.to(tl.uint32)
        high = (seed >> 32).to(tl.uint32)
    else:
        key = key.to(tl.uint32)
        high = high.to(tl.uint32)
    word0, word1 = philox2x32(group ^ high, other, key)
    if EXACT:
        o0, o1, o2, o3 = _exact(x0, x1, x2, x3, word0)
    else:
        o0, o1, o2, o3 = _approximate(x0, x1, x2, x3, word0, word1)
    sound = (tl.abs(x0) + tl.abs(x1)) + (tl.abs(x2) + tl.abs(x3)) < _SUM_LIMIT
    nan = float("nan")
    o0, o1 = tl.where(sound, o0, nan), tl.where(sound, o1, nan)
    return o0, o1, tl.where(sound, o2, 0.0), tl.where(sound, o3, 0.0)


@triton.jit(do_not_specialize=["key", "high", "first_group", "first_other"])
def _along_rows_kernel(
    g_ptr,
    out_ptr,
    seed_ptr,
    key,
    high,
    num_rows,
    num_columns,
    g_stride,
    first_group,
    first_other,
    EXACT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Groups of 4 rows: a tile of ROWS groups x COLUMNS, the four rows loaded one by one."""
    tiles = tl.cdiv(num_columns, COLUMNS)
    pid = tl.program_id(0)
    group = (pid // tiles) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (pid % tiles) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    row = group.to(tl.int64) * 4
    inside = column < num_columns
    m0, m1 = (row < num_rows) & inside, (row + 1 < num_rows) & inside
    m2, m3 = (row + 2 < num_rows) & inside, (row + 3 < num_rows) & inside
    g_ptrs = g_ptr + row * g_stride + column
    x0 = tl.load(g_ptrs, mask=m0, other=0.0).to(tl.float32)
    x1 = tl.load(g_ptrs + g_stride, mask=m1, other=0.0).to(tl.float32)
    x2 = tl.load(g_ptrs + 2 * g_stride, mask=m2, other=0.0).to(tl.float32)
    x3 = tl.load(g_ptrs + 3 * g_stride, mask=m3, other=0.0).to(tl.float32)
    group_counter = group.to(tl.uint32) + first_group.to(tl.uint32)
    other_counter = column.to(tl.uint32) + first_other.to(tl.uint32)
    o0, o1, o2, o3 = _sample(
        x0, x1, x2, x3, group_counter, other_counter, seed_ptr, key, high, EXACT
    )
    out_ptrs = out_ptr + row * num_columns + column
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    tl.store(out_ptrs, o0.to(dtype), mask=m0)
    tl.store(out_ptrs + num_columns, o1.to(dtype), mask=m1)
    tl.store(out_ptrs + 2 * num_columns, o2.to(dtype), mask=m2)
    tl.store(out_ptrs + 3 * num_columns, o3.to(dtype), mask=m3)


@triton.jit(do_not_specialize=["key", "high", "first_group", "first_other"])
def _along_columns_kernel(
    g_ptr,
    out_ptr,
    seed_ptr,
    key,
    high,
    num_rows,
    num_columns,
    g_stride,
    first_group,
    first_other,
    EXACT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Groups of 4 columns: a tile of ROWS x COLUMNS groups, split in registers."""
    tiles = tl.cdiv(num_columns, 4 * COLUMNS)
    pid = tl.program_id(0)
    row = (pid // tiles) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (pid % tiles) * (4 * COLUMNS) + tl.arange(0, 4 * COLUMNS)[None, :]
    mask = (row < num_rows) & (column < num_columns)
    row64 = row.to(tl.int64)
    x = tl.load(g_ptr + row64 * g_stride + column, mask=mask, other=0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(x, (ROWS, COLUMNS, 2, 2)))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    group = (pid % tiles) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    group_counter = group.to(tl.uint32) + first_group.to(tl.uint32)
    other_counter = row.to(tl.uint32) + first_other.to(tl.uint32)
    o0, o1, o2, o3 = _sample(
        x0, x1, x2, x3, group_counter, other_counter, seed_ptr, key, high, EXACT
    )
    out = tl.reshape(tl.join(tl.join(o0, o2), tl.join(o1, o3)), (ROWS, 4 * COLUMNS))
    out_ptrs = out_ptr + row64 * num_columns + column
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask)


def mvue24(
    g: torch.Tensor, seed: SeedLike, dim: int, offsets: tuple[int, int], exact: bool
) -> torch.Tensor:
    """See `megasparse.kernels.mvue24`; arguments are checked there, `dim` is 0 or 1."""
    if g.stride(1) != 1 and g.stride(0) == 1:
        return mvue24(g.t(), seed, 1 - dim, (offsets[1], offsets[0]), exact).t()
    if g.stride(1) != 1:
        g = g.contiguous()
    rows, columns = g.shape
    out = torch.empty((rows, columns), dtype=g.dtype, device=g.device)
    if dim == 0:
        kernel, launch, groups = _along_rows_kernel, ALONG_ROWS, (triton.cdiv(rows, 4), columns)
    else:
        kernel, launch, groups = (
            _along_columns_kernel,
            ALONG_COLUMNS,
            (rows, triton.cdiv(columns, 4)),
        )
    launch = INTERPRETED if INTERPRETING else launch
    grid = (triton.cdiv(groups[0], launch.rows) * triton.cdiv(groups[1], launch.columns),)
    seed_ptr, key, high = _seed_arguments(seed)
    kernel[grid](
        g,
        out,
        seed_ptr,
        key,
        high,
        rows,
        columns,
        g.stride(0),
        offsets[dim] // 4,
        offsets[1 - dim],
        EXACT=exact,
        ROWS=launch.rows,
        COLUMNS=launch.columns,
        num_warps=launch.num_warps,
        enable_fp_fusion=False,
    )
    return out


def _seed_arguments(seed: SeedLike) -> tuple[torch.Tensor | None, int, int]:
    """A device seed as a pointer, or an int as two int32 (one type, so one compiled kernel)."""
    if isinstance(seed, torch.Tensor):
        return seed, 0, 0
    key, high = (int(word) for word in seed_words(seed))
    return None, key - ((key >> 31) << 32), high - ((high >> 31) << 32)
