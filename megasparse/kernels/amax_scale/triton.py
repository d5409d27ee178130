"""The scale of `amax_scale` in one pass: maxima of tiles, then one program over them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from megasparse.kernels.device.groups import widen
from megasparse.kernels.dispatch import INTERPRETING
from megasparse.kernels.packed24 import E4M3_MAX, SMALLEST_SCALE

_E4M3_MAX = tl.constexpr(E4M3_MAX)
_SMALLEST_SCALE = tl.constexpr(SMALLEST_SCALE)


@dataclass(frozen=True)
class Launch:
    """A tile of `rows` x `columns` a program."""

    rows: int
    columns: int
    num_warps: int


# A thread has eight loads of 16 bytes (16-bit entries) under way.
TILE = Launch(rows=8, columns=1024, num_warps=4)
# The interpreter costs time per program, not per element.
INTERPRETED = Launch(rows=64, columns=1024, num_warps=4)
# Partial maxima that the one program of `_finish_kernel` reads at a time.
PARTIALS = 4096


@triton.jit
def _amax_kernel(
    w_ptr, partial_ptr, num_rows, num_columns, w_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """The largest magnitude of a tile as float32 bits, which are ordered alike, NaN above all."""
    tiles = tl.cdiv(num_columns, COLUMNS)
    pid = tl.program_id(0)
    column = (pid % tiles) * COLUMNS + tl.arange(0, COLUMNS)
    worst = tl.zeros((COLUMNS,), tl.int32)
    for i in tl.static_range(ROWS):
        row = (pid // tiles) * ROWS + i
        inside = (row < num_rows) & (column < num_columns)
        w = tl.load(w_ptr + row.to(tl.int64) * w_stride + column, mask=inside, other=0.0)
        worst = tl.maximum(worst, widen(w).to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    tl.store(partial_ptr + pid, tl.max(worst))


@triton.jit
def _finish_kernel(partial_ptr, scale_ptr, partials, BLOCK: tl.constexpr):
    """`reference.amax_scale` from the partial maxima: one program."""
    bits = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, partials, BLOCK):
        index = start + tl.arange(0, BLOCK)
        bits = tl.maximum(bits, tl.load(partial_ptr + index, mask=index < partials, other=0))
    amax = tl.max(bits).to(tl.float32, bitcast=True)
    scale = tl.div_rn(amax, _E4M3_MAX)
    scale = tl.where(scale < _SMALLEST_SCALE, _SMALLEST_SCALE, scale)  # NaN stays
    tl.store(scale_ptr, tl.where(amax == 0, 1.0, scale))


def amax_scale(w: torch.Tensor) -> torch.Tensor:
    """See reference.py; its amax is also that of a `w` with NaN or infinities."""
    if w.stride(1) != 1:
        w = w.contiguous()
    rows, columns = w.shape
    launch = INTERPRETED if INTERPRETING else TILE
    programs = triton.cdiv(rows, launch.rows) * triton.cdiv(columns, launch.columns)
    partial = torch.empty(programs, dtype=torch.int32, device=w.device)
    scale = torch.empty((), dtype=torch.float32, device=w.device)
    _amax_kernel[(programs,)](
        w,
        partial,
        rows,
        columns,
        w.stride(0),
        ROWS=launch.rows,
        COLUMNS=launch.columns,
        num_warps=launch.num_warps,
    )
    _finish_kernel[(1,)](partial, scale, programs, BLOCK=PARTIALS, num_warps=8)
    return scale
