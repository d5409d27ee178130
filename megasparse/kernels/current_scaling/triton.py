"""Current scaling's scales in one launch, and the in-place product with two device scalars."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megasparse.kernels.current_scaling.reference import FLOAT32_MAX, MVUE_BOUND
from megasparse.kernels.groups import KINDS, Launch, Launches
from megasparse.kernels.groups.triton import rounded, widen
from megasparse.kernels.packed24 import E4M3_MAX

# In entries: 16 bytes a thread and load, two loads under way.
LAUNCHES = Launches(wide=Launch(block=2048, num_warps=4), narrow=Launch(block=4096, num_warps=4))
# Enough to fill a large GPU (132 multiprocessors, 8 programs each), few enough to end in 2 us.
MAX_PROGRAMS = 1056
_FLOAT32_MAX = tl.constexpr(FLOAT32_MAX)
_MVUE_BOUND = tl.constexpr(MVUE_BOUND)
_E4M3_MAX = tl.constexpr(E4M3_MAX)
_LARGEST_POWER = tl.constexpr(2.0**126)


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


def scales_of_amax(
    amax: torch.Tensor, maximum: float, power_of_two: bool, out: torch.Tensor
) -> None:
    """See reference.py."""
    _scales_kernel[(1,)](amax, out, maximum, POWER_OF_TWO=power_of_two, num_warps=1)


def rescale(z: torch.Tensor, a: torch.Tensor, b: torch.Tensor, applied_inv: float) -> None:
    """See reference.py."""
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
