"""Triton kernels of `mvue24`: the draws of reference.py; exact magnitudes are equal bit for bit.

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
from megasparse.kernels.mvue24.reference import SCALE_DOWN, SCALE_UP, SMALL, TINY
from megasparse.kernels.philox.triton import philox2x32, uniform24
from megasparse.kernels.random import SeedLike, seed_words

_SMALL = tl.constexpr(SMALL)
_SCALE_UP = tl.constexpr(SCALE_UP)
_SCALE_DOWN = tl.constexpr(SCALE_DOWN)
_TINY = tl.constexpr(TINY)
_INTERPRETING = tl.constexpr(INTERPRETING)


@dataclass(frozen=True)
class Launch:
    """A tile of `rows` x `columns`, counted in groups along the grouped dimension."""

    rows: int
    columns: int
    num_warps: int


# 8 groups a thread.
ALONG_ROWS = Launch(rows=4, columns=256, num_warps=4)
ALONG_COLUMNS = Launch(rows=2, columns=512, num_warps=4)
# The interpreter costs time per program, not per element.
INTERPRETED = Launch(rows=64, columns=256, num_warps=4)


@triton.jit
def _threshold(u, total):
    below = (total.to(tl.int32, bitcast=True) - 1).to(tl.float32, bitcast=True)
    return tl.minimum(u * total, below)


@triton.jit
def _min(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _max(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _exact(a0, a1, a2, a3, word, scale):
    """`reference.exact_magnitudes`, line by line; times `scale`; then the largest of the group
    before and after pruning, both unscaled: what is kept is `step`, or at the largest more.
    """
    smaller01, larger01 = _min(a0, a1), _max(a0, a1)
    smaller23, larger23 = _min(a2, a3), _max(a2, a3)
    middle, largest = _min(larger01, larger23), _max(larger01, larger23)
    c1 = smaller01 + smaller23
    r = c1 + middle
    step = (r + _min(largest, r)) * 0.5
    t = _threshold(uniform24(word), step)
    first0, first1 = smaller01 > t, c1 > t
    second1, second2 = c1 - step > t, r - step > t
    most = _max(largest, step)
    kept = tl.where(second2, step, most)
    step, most = step * scale, most * scale
    v_smaller01 = tl.where(first0, step, 0.0)
    v_smaller23 = tl.where((first1 ^ first0) | second1, step, 0.0)
    v_middle = tl.where(first1, tl.where(second2 ^ second1, step, 0.0), step)
    v_largest = tl.where(second2, 0.0, most)
    winner01, winner0, winner2 = larger01 >= larger23, a0 >= a1, a2 >= a3
    v01 = tl.where(winner01, v_largest, v_middle)
    v23 = tl.where(winner01, v_middle, v_largest)
    o0, o1 = tl.where(winner0, v01, v_smaller01), tl.where(winner0, v_smaller01, v01)
    o2, o3 = tl.where(winner2, v23, v_smaller23), tl.where(winner2, v_smaller23, v23)
    return o0, o1, o2, o3, largest, kept


@triton.jit
def _reciprocal(x):
    """1 / x within 1 ulp by the GPU's one instruction; it takes subnormals for zero."""
    if _INTERPRETING:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _approximate(a0, a1, a2, a3, word0, word1):
    """`reference.approximate_magnitudes`; reciprocals are the GPU's, all four magnitudes are made.

    Selections and comparisons run at half the rate of sums and products, so the two kept are
    selected last.
    """
    sum_all = a0 + a1 + a2 + a3
    scale = tl.where(sum_all < _SMALL, _SCALE_UP, _SCALE_DOWN)
    a0, a1, a2, a3 = a0 * scale, a1 * scale, a2 * scale, a3 * scale
    low, high = a0 + a1, a2 + a3
    c2 = low + a2
    t = uniform24(word0) * (c2 + a3)
    above1 = low > t
    f0 = a0 > t
    f1 = above1 & (f0 == 0)
    f2 = (c2 > t) & (above1 == 0)
    f3 = (c2 > t) == 0
    e0 = tl.where(f0, 0.0, a0)
    e1 = e0 + tl.where(f1, 0.0, a1)
    e2 = e1 + tl.where(f2, 0.0, a2)
    t = uniform24(word1) * (e2 + tl.where(f3, 0.0, a3))
    again1 = e1 > t
    s0 = e0 > t
    s1 = again1 & (s0 == 0)
    s2 = (e2 > t) & (again1 == 0)
    s3 = (e2 > t) == 0
    low, high = low + _TINY, high + _TINY
    q0, q1 = a0 * _reciprocal(a1 + high), a1 * _reciprocal(a0 + high)
    q2, q3 = a2 * _reciprocal(low + a3), a3 * _reciprocal(low + a2)
    q_low, q_high = 1.0 + (q0 + q1), 1.0 + (q2 + q3)
    o0 = tl.where(f0 | s0, sum_all * _reciprocal(q1 + q_high), 0.0)
    o1 = tl.where(f1 | s1, sum_all * _reciprocal(q0 + q_high), 0.0)
    o2 = tl.where(f2 | s2, sum_all * _reciprocal(q_low + q3), 0.0)
    o3 = tl.where(f3 | s3, sum_all * _reciprocal(q_low + q2), 0.0)
    return o0, o1, o2, o3


@triton.jit
def _signed(magnitude, x):
    """A magnitude with the sign of x: one instruction where the compiler may make two."""
    if _INTERPRETING:
        sign = x.to(tl.uint32, bitcast=True) & 0x80000000
        return (magnitude.to(tl.uint32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    else:
        return tl.inline_asm_elementwise(
            "copysign.f32 $0, $2, $1;", "=f,f,f", [magnitude, x], tl.float32, True, 1
        )


@triton.jit
def _sample(x0, x1, x2, x3, group, other, seed_ptr, key, high, EXACT: tl.constexpr):
    """The four entries of each group after pruning; `group` and `other` are uint32 counters."""
    key, high = seed_of(seed_ptr, key, high)
    o0, o1, o2, o3, _, _ = sample_scaled(x0, x1, x2, x3, group, other, key, high, 1.0, EXACT)
    return o0, o1, o2, o3


@triton.jit
def seed_of(seed_ptr, key, high):
    """The two words of a seed as uint32: of the one in memory, if there is a pointer."""
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
        key = seed.to(tl.uint32)
        high = (seed >> 32).to(tl.uint32)
    else:
        key = key.to(tl.uint32)
        high = high.to(tl.uint32)
    return key, high


@triton.jit
def draw(x, group, other, key, high):
    """The two random words of each group, in the threads that hold `x`, one of its gradients."""
    # Zero, and LLVM knows it; Triton does not, and so draws the numbers in the threads that hold
    # the gradients. Otherwise it draws them elsewhere and moves them through shared memory.
    nothing = (x.to(tl.uint32, bitcast=True) & 1) >> 1
    return philox2x32((group ^ high) ^ nothing, other, key)


@triton.jit
def sample_scaled(x0, x1, x2, x3, group, other, key, high, scale, EXACT: tl.constexpr):
    """The same times `scale` (positive); then the largest magnitudes before and after, unscaled."""
    word0, word1 = draw(x0, group, other, key, high)
    a0, a1, a2, a3 = tl.abs(x0), tl.abs(x1), tl.abs(x2), tl.abs(x3)
    if EXACT:
        o0, o1, o2, o3, largest, kept = _exact(a0, a1, a2, a3, word0, scale)
    else:
        o0, o1, o2, o3 = _approximate(a0, a1, a2, a3, word0, word1)
        largest = _max(_max(a0, a1), _max(a2, a3))
        kept = _max(_max(o0, o1), _max(o2, o3))
        o0, o1, o2, o3 = o0 * scale, o1 * scale, o2 * scale, o3 * scale
    o0, o1, o2, o3 = _signed(o0, x0), _signed(o1, x1), _signed(o2, x2), _signed(o3, x3)
    return o0, o1, o2, o3, largest, kept


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
    g_stride = tl.cast(g_stride, tl.int64)
    out_stride = tl.cast(num_columns, tl.int64)
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
    out_ptrs = out_ptr + row * out_stride + column
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    tl.store(out_ptrs, o0.to(dtype), mask=m0)
    tl.store(out_ptrs + out_stride, o1.to(dtype), mask=m1)
    tl.store(out_ptrs + 2 * out_stride, o2.to(dtype), mask=m2)
    tl.store(out_ptrs + 3 * out_stride, o3.to(dtype), mask=m3)


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
