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

from megasparse.kernels.device.groups import first_token
from megasparse.kernels.dispatch import INTERPRETING
from megasparse.kernels.mvue24.triton_sampler import sample_scaled, seed_arguments, seed_of
from megasparse.kernels.random import SeedLike
from megasparse.kernels.token_order import step_within


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
def _sample(x0, x1, x2, x3, group, other, seed_ptr, key, high, EXACT: tl.constexpr):
    """The four entries of each group after pruning; `group` and `other` are uint32 counters."""
    key, high = seed_of(seed_ptr, key, high)
    o0, o1, o2, o3, _, _ = sample_scaled(x0, x1, x2, x3, group, other, key, high, 1.0, EXACT)
    return o0, o1, o2, o3


@triton.jit(do_not_specialize=["key", "high", "first_group", "first_other"])
def _along_rows_kernel(
    g_ptr,
    out_ptr,
    groups_ptr,
    seed_ptr,
    key,
    high,
    num_rows,
    num_columns,
    g_stride,
    first_group,
    first_other,
    step,
    EXACT: tl.constexpr,
    STRIDED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Groups of 4 rows: a tile of ROWS groups x COLUMNS, the four rows loaded one by one."""
    tiles = tl.cdiv(num_columns, COLUMNS)
    pid = tl.program_id(0)
    group = (pid // tiles) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (pid % tiles) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    row = first_token(group, STRIDED)
    inside = column < num_columns
    if STRIDED:
        inside = inside & (group < step)
    m0, m1 = (row < num_rows) & inside, (row + step < num_rows) & inside
    m2, m3 = (row + 2 * step < num_rows) & inside, (row + 3 * step < num_rows) & inside
    g_ptrs = g_ptr + row * tl.cast(g_stride, tl.int64) + column
    out_ptrs = out_ptr + row * tl.cast(num_columns, tl.int64) + column
    # From a row of a group to the next.
    g_stride = tl.cast(g_stride, tl.int64) * step
    out_stride = tl.cast(num_columns, tl.int64) * step
    x0 = tl.load(g_ptrs, mask=m0, other=0.0).to(tl.float32)
    x1 = tl.load(g_ptrs + g_stride, mask=m1, other=0.0).to(tl.float32)
    x2 = tl.load(g_ptrs + 2 * g_stride, mask=m2, other=0.0).to(tl.float32)
    x3 = tl.load(g_ptrs + 3 * g_stride, mask=m3, other=0.0).to(tl.float32)
    group_counter = group.to(tl.uint32) + first_group.to(tl.uint32)
    if groups_ptr is not None:
        here = group * 4 < num_rows
        group_counter = tl.load(groups_ptr + group, mask=here, other=0).to(tl.uint32)
    other_counter = column.to(tl.uint32) + first_other.to(tl.uint32)
    o0, o1, o2, o3 = _sample(
        x0, x1, x2, x3, group_counter, other_counter, seed_ptr, key, high, EXACT
    )
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    tl.store(out_ptrs, o0.to(dtype), mask=m0)
    tl.store(out_ptrs + out_stride, o1.to(dtype), mask=m1)
    tl.store(out_ptrs + 2 * out_stride, o2.to(dtype), mask=m2)
    tl.store(out_ptrs + 3 * out_stride, o3.to(dtype), mask=m3)


@triton.jit(do_not_specialize=["key", "high", "first_group", "first_other"])
def _along_columns_kernel(
    g_ptr,
    out_ptr,
    groups_ptr,
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
    if groups_ptr is not None:
        here = group * 4 < num_columns
        group_counter = tl.load(groups_ptr + group, mask=here, other=0).to(tl.uint32)
    other_counter = row.to(tl.uint32) + first_other.to(tl.uint32)
    o0, o1, o2, o3 = _sample(
        x0, x1, x2, x3, group_counter, other_counter, seed_ptr, key, high, EXACT
    )
    out = tl.reshape(tl.join(tl.join(o0, o2), tl.join(o1, o3)), (ROWS, 4 * COLUMNS))
    out_ptrs = out_ptr + row64 * num_columns + column
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask)


def mvue24(
    g: torch.Tensor,
    seed: SeedLike,
    dim: int,
    offsets: tuple[int, int],
    exact: bool,
    strided: bool = False,
    groups: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `megasparse.kernels.mvue24`; arguments are checked there, `dim` is 0 or 1."""
    if strided and (dim == 1 or g.stride(1) != 1):
        # One kernel alone knows strided groups: of rows.
        along = (g.t() if dim == 1 else g).contiguous()
        drawn = mvue24(along, seed, 0, (offsets[dim], offsets[1 - dim]), exact, True)
        return torch.empty_like(g).copy_(drawn.t() if dim == 1 else drawn)
    if g.stride(1) != 1 and g.stride(0) == 1:
        return mvue24(g.t(), seed, 1 - dim, (offsets[1], offsets[0]), exact, False, groups).t()
    if g.stride(1) != 1:
        g = g.contiguous()
    rows, columns = g.shape
    out = torch.empty((rows, columns), dtype=g.dtype, device=g.device)
    if dim == 0:
        kernel, launch, tiles = _along_rows_kernel, ALONG_ROWS, (triton.cdiv(rows, 4), columns)
    else:
        kernel, launch = _along_columns_kernel, ALONG_COLUMNS
        tiles = (rows, triton.cdiv(columns, 4))
    launch = INTERPRETED if INTERPRETING else launch
    grid = (triton.cdiv(tiles[0], launch.rows) * triton.cdiv(tiles[1], launch.columns),)
    seed_ptr, key, high = seed_arguments(seed)
    apart = {}
    if dim == 0:
        apart = {"step": step_within(4 * tiles[0], strided), "STRIDED": strided}
    kernel[grid](
        g,
        out,
        None if groups is None else groups.contiguous(),
        seed_ptr,
        key,
        high,
        rows,
        columns,
        g.stride(0),
        offsets[dim] // 4,
        offsets[1 - dim],
        **apart,
        EXACT=exact,
        ROWS=launch.rows,
        COLUMNS=launch.columns,
        num_warps=launch.num_warps,
        enable_fp_fusion=False,
    )
    return out
