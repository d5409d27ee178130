"""Current scaling's scales of a tensor or of an amax, and the product with two device scalars."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megasparse.kernels.current_scaling.reference import FLOAT32_MAX, MVUE_BOUND
from megasparse.kernels.device.groups import rounded, widen
from megasparse.kernels.dispatch import INTERPRETING
from megasparse.kernels.launches import KINDS, Launch, Launches, Tile
from megasparse.kernels.packed24 import E4M3_MAX, SMALLEST_SCALE_INV

# A thread has eight loads of 16 bytes (16-bit entries) under way.
TILE = Tile(rows=8, columns=1024, num_warps=4)
# The interpreter costs time per program, not per element.
INTERPRETED = Tile(rows=64, columns=1024, num_warps=4)
# Partial maxima that the one program of `_finish_kernel` reads at a time.
PARTIALS = 4096
# In entries: 16 bytes a thread and load, two loads under way.
LAUNCHES = Launches(wide=Launch(block=2048, num_warps=4), narrow=Launch(block=4096, num_warps=4))
# Enough to fill a large GPU (132 multiprocessors, 8 programs each), few enough to end in 2 us.
MAX_PROGRAMS = 1056
_FLOAT32_MAX = tl.constexpr(FLOAT32_MAX)
_MVUE_BOUND = tl.constexpr(MVUE_BOUND)
_E4M3_MAX = tl.constexpr(E4M3_MAX)
_LARGEST_POWER = tl.constexpr(2.0**126)
_SMALLEST_SCALE_INV = tl.constexpr(SMALLEST_SCALE_INV)


@triton.jit
def _scales_kernel(amax_ptr, out_ptr, maximum, POWER_OF_TWO: tl.constexpr):
    """Lane 0 for the tensor, lane 1 for draws from it."""
    lane = tl.arange(0, 2)
    amax = tl.load(amax_ptr) * tl.where(lane == 0, 1.0, _MVUE_BOUND)
    most = tl.where(lane == 0, maximum, _E4M3_MAX)
    usable = (amax > 0) & (amax <= _FLOAT32_MAX)
    scale = tl.div_rn(most, tl.where(usable, amax, 1.0))
    scale = tl.where(usable, tl.minimum(scale, _FLOAT32_MAX), 1.0)
    if POWER_OF_TWO:
        bits = scale.to(tl.int32, bitcast=True) & 0x7F800000
        scale = tl.minimum(bits.to(tl.float32, bitcast=True), _LARGEST_POWER)
    tl.store(out_ptr + 8 * lane, scale)
    tl.store(out_ptr + 8 * lane + 4, tl.div_rn(tl.full((2,), 1.0, tl.float32), scale))


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
def _finish_kernel(partial_ptr, scale_inv_ptr, partials, BLOCK: tl.constexpr):
    """`reference.scale_inv_of` from the partial maxima: one program."""
    bits = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, partials, BLOCK):
        index = start + tl.arange(0, BLOCK)
        bits = tl.maximum(bits, tl.load(partial_ptr + index, mask=index < partials, other=0))
    amax = tl.max(bits).to(tl.float32, bitcast=True)
    scale_inv = tl.div_rn(amax, _E4M3_MAX)
    scale_inv = tl.where(
        scale_inv < _SMALLEST_SCALE_INV, _SMALLEST_SCALE_INV, scale_inv
    )  # NaN stays
    tl.store(scale_inv_ptr, tl.where(amax == 0, 1.0, scale_inv))


@triton.jit
def _rescale_kernel(
    z_ptr, a_ptr, b_ptr, applied_inv, size, KIND: tl.constexpr, BLOCK: tl.constexpr
):
    """Few programs, each over many blocks: where the factor is 1 they end at once."""
    factor = tl.load(a_ptr) * applied_inv * tl.load(b_ptr)
    if factor != 1.0:
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        at = tl.program_id(0).to(tl.int64) * BLOCK
        while at < size:
            here = at + tl.arange(0, BLOCK)
            live = here < size
            z = widen(tl.load(z_ptr + here, mask=live, other=0.0)) * factor
            z = tl.where(z == z, rounded(z, KIND), z)
            tl.store(z_ptr + here, z.to(z_ptr.dtype.element_ty), mask=live)
            at += step


def scale_inv_of(w: torch.Tensor) -> torch.Tensor:
    """See reference.py; its amax is also that of a `w` with NaN or infinities."""
    if w.stride(1) != 1:
        w = w.contiguous()
    rows, columns = w.shape
    launch = INTERPRETED if INTERPRETING else TILE
    programs = triton.cdiv(rows, launch.rows) * triton.cdiv(columns, launch.columns)
    partial = torch.empty(programs, dtype=torch.int32, device=w.device)
    scale_inv = torch.empty((), dtype=torch.float32, device=w.device)
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
    _finish_kernel[(1,)](partial, scale_inv, programs, BLOCK=PARTIALS, num_warps=8)
    return scale_inv


def scales_of_amax(
    amax: torch.Tensor, maximum: float, power_of_two: bool
) -> tuple[torch.Tensor, ...]:
    """See reference.py; each of the four in 16 bytes of its own."""
    out = torch.empty(4, 4, dtype=torch.float32, device=amax.device)
    _scales_kernel[(1,)](amax, out, maximum, POWER_OF_TWO=power_of_two, num_warps=1)
    return out[:, 0].unbind()


def rescale_(z: torch.Tensor, a: torch.Tensor, b: torch.Tensor, applied_inv: float) -> None:
    """`reference.rescaled` of z, in place."""
    launch = LAUNCHES.pick(z)
    blocks = min(triton.cdiv(z.numel(), launch.block), MAX_PROGRAMS)
    _rescale_kernel[(blocks,)](
        z,
        a,
        b,
        applied_inv,
        z.numel(),
        KIND=KINDS[z.dtype],
        BLOCK=launch.block,
        num_warps=launch.num_warps,
    )
