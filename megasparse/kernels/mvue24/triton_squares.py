"""Triton kernels of `mvue24_squares`: one pass over g, without a draw.

A program walks over tiles of groups and writes two partial sums; torch adds up the programs', whose
number depends on g's shape alone. So the same g gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megasparse.kernels.device.groups import first_token, larger, widen
from megasparse.kernels.dispatch import INTERPRETING
from megasparse.kernels.launches import Tile
from megasparse.kernels.mvue24.reference import SCALE_DOWN, SCALE_UP, SMALL, TINY
from megasparse.kernels.mvue24.triton_sampler import reciprocal
from megasparse.kernels.token_order import step_within

# In groups: 8 of them a thread, each of whose four loads is of 16 bytes where g has 16 bits.
ALONG_ROWS = Tile(rows=4, columns=256, num_warps=4)
ALONG_COLUMNS = Tile(rows=2, columns=512, num_warps=4)
# The interpreter costs time per program, not per element.
INTERPRETED = Tile(rows=64, columns=256, num_warps=4)
# Enough to fill a large GPU (132 multiprocessors, 8 programs each).
MAX_PROGRAMS = 1056
_SMALL = tl.constexpr(SMALL)
_SCALE_UP = tl.constexpr(SCALE_UP)
_SCALE_DOWN = tl.constexpr(SCALE_DOWN)
_TINY = tl.constexpr(TINY)


@triton.jit
def _approximate(a0, a1, a2, a3):
    """float64: `reference.expected_square` of each group by the approximate sampler."""
    total = a0 + a1 + a2 + a3
    scale = tl.where(total < _SMALL, _SCALE_UP, _SCALE_DOWN)
    s0, s1, s2, s3 = a0 * scale, a1 * scale, a2 * scale, a3 * scale
    low, high = s0 + s1 + _TINY, s2 + s3 + _TINY
    q0, q1 = s0 * reciprocal(s1 + high), s1 * reciprocal(s0 + high)
    q2, q3 = s2 * reciprocal(low + s3), s3 * reciprocal(low + s2)
    low, high = 1.0 + (q0 + q1), 1.0 + (q2 + q3)
    # Each entry is kept as total / its divisor, so the total leaves the sum; the product of the two
    # is float64, for squares of small gradients are no float32.
    kept = a0 * reciprocal(q1 + high) + a1 * reciprocal(q0 + high)
    kept += a2 * reciprocal(low + q3) + a3 * reciprocal(low + q2)
    return total.to(tl.float64) * kept.to(tl.float64)


@triton.jit
def _squares(x0, x1, x2, x3, EXACT: tl.constexpr):
    """float64: of each group the sum of squares, and the expected one after the draw less that."""
    a0, a1, a2, a3 = tl.abs(widen(x0)), tl.abs(widen(x1)), tl.abs(widen(x2)), tl.abs(widen(x3))
    d0, d1, d2, d3 = a0.to(tl.float64), a1.to(tl.float64), a2.to(tl.float64), a3.to(tl.float64)
    square = (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3)
    if EXACT:
        largest = larger(larger(a0, a1), larger(a2, a3)).to(tl.float64)
        total = (d0 + d1) + (d2 + d3)
        rest = total - largest
        both = largest * largest + rest * rest
        expected = tl.where(largest < rest, total * total * 0.5, both)
    else:
        expected = _approximate(a0, a1, a2, a3)
    return square, expected - square


@triton.jit
def _store_sums(sums_ptr, square, variance):
    pid, programs = tl.program_id(0), tl.num_programs(0)
    tl.store(sums_ptr + pid, tl.sum(tl.sum(square, 1)))
    tl.store(sums_ptr + programs + pid, tl.sum(tl.sum(variance, 1)))


@triton.jit
def _along_rows_kernel(
    g_ptr,
    sums_ptr,
    num_rows,
    num_columns,
    g_stride,
    groups,
    step,
    EXACT: tl.constexpr,
    STRIDED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Groups of 4 rows: tiles of ROWS groups x COLUMNS, the four rows loaded one by one."""
    across = tl.cdiv(num_columns, COLUMNS)
    tiles = tl.cdiv(groups, ROWS) * across
    square = tl.zeros((ROWS, COLUMNS), tl.float64)
    variance = tl.zeros((ROWS, COLUMNS), tl.float64)
    stride = tl.cast(g_stride, tl.int64) * step
    tile = tl.program_id(0)
    while tile < tiles:
        group = (tile // across) * ROWS + tl.arange(0, ROWS)[:, None]
        column = (tile % across) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        row = first_token(group, STRIDED)
        inside = (column < num_columns) & (group < groups)
        ptrs = g_ptr + row * tl.cast(g_stride, tl.int64) + column
        x0 = tl.load(ptrs, mask=inside & (row < num_rows), other=0.0)
        x1 = tl.load(ptrs + stride, mask=inside & (row + step < num_rows), other=0.0)
        x2 = tl.load(ptrs + 2 * stride, mask=inside & (row + 2 * step < num_rows), other=0.0)
        x3 = tl.load(ptrs + 3 * stride, mask=inside & (row + 3 * step < num_rows), other=0.0)
        of_group, more = _squares(x0, x1, x2, x3, EXACT)
        square += of_group
        variance += more
        tile += tl.num_programs(0)
    _store_sums(sums_ptr, square, variance)


@triton.jit
def _along_columns_kernel(
    g_ptr,
    sums_ptr,
    num_rows,
    num_columns,
    g_stride,
    EXACT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Groups of 4 columns: tiles of ROWS x COLUMNS groups, split in registers."""
    across = tl.cdiv(num_columns, 4 * COLUMNS)
    tiles = tl.cdiv(num_rows, ROWS) * across
    square = tl.zeros((ROWS, COLUMNS), tl.float64)
    variance = tl.zeros((ROWS, COLUMNS), tl.float64)
    tile = tl.program_id(0)
    while tile < tiles:
        row = (tile // across) * ROWS + tl.arange(0, ROWS)[:, None]
        column = (tile % across) * (4 * COLUMNS) + tl.arange(0, 4 * COLUMNS)[None, :]
        ptrs = g_ptr + row.to(tl.int64) * g_stride + column
        x = tl.load(ptrs, mask=(row < num_rows) & (column < num_columns), other=0.0)
        even, odd = tl.split(tl.reshape(x, (ROWS, COLUMNS, 2, 2)))
        x0, x2 = tl.split(even)
        x1, x3 = tl.split(odd)
        of_group, more = _squares(x0, x1, x2, x3, EXACT)
        square += of_group
        variance += more
        tile += tl.num_programs(0)
    _store_sums(sums_ptr, square, variance)


def squares(g: torch.Tensor, dim: int, exact: bool, strided: bool) -> torch.Tensor:
    """See reference.py; `dim` is 0 or 1."""
    if dim == 1 and (strided or g.stride(1) != 1):
        # Row-major, one kernel alone knows strided groups: of rows.
        return squares(g.t(), 0, exact, strided)
    if g.stride(1) != 1 and g.stride(0) == 1 and not strided:
        return squares(g.t(), 1, exact, strided)
    if g.stride(1) != 1:
        g = g.contiguous()
    rows, columns = g.shape
    groups = triton.cdiv(g.shape[dim], 4)
    tile = ALONG_ROWS if dim == 0 else ALONG_COLUMNS
    tile = INTERPRETED if INTERPRETING else tile
    size = (groups, columns) if dim == 0 else (rows, groups)
    tiles = triton.cdiv(size[0], tile.rows) * triton.cdiv(size[1], tile.columns)
    programs = min(tiles, MAX_PROGRAMS)
    sums = torch.empty(2, programs, dtype=torch.float64, device=g.device)
    how = {"EXACT": exact, "ROWS": tile.rows, "COLUMNS": tile.columns, "num_warps": tile.num_warps}
    if dim == 0:
        step = step_within(4 * groups, strided)
        _along_rows_kernel[(programs,)](
            g, sums, rows, columns, g.stride(0), groups, step, STRIDED=strided, **how
        )
    else:
        _along_columns_kernel[(programs,)](g, sums, rows, columns, g.stride(0), **how)
    return sums.sum(1)
