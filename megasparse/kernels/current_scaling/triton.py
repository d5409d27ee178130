"""Current scaling's scales in one launch, and the in-place product with two device scalars."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megasparse.kernels.current_scaling.reference import FLOAT32_MAX, MVUE_BOUND
from megasparse.kernels.device.groups import rounded, widen
from megasparse.kernels.launches import KINDS, Launch, Launches
from megasparse.kernels.packed24 import E4M3_MAX

# In entries: 16 bytes a thread and load, two loads under way.
LAUNCHES = Launches(wide=Launch(block=2048, num_warps=4), narrow=Launch(block=4096, num_warps=4))
_FLOAT32_MAX = tl.constexpr(FLOAT32_MAX)
_MVUE_BOUND = tl.constexpr(MVUE_BOUND)
_E4M3_MAX = tl.constexpr(E4M3_MAX)


@triton.jit
def _scales_kernel(amax_ptr, out_ptr, maximum):
    """Lane 0 for the tensor, lane 1 for draws from it."""
    lane = tl.arange(0, 2)
    amax = tl.load(amax_ptr) * tl.where(lane == 0, 1.0, _MVUE_BOUND)
    most = tl.where(lane == 0, maximum, _E4M3_MAX)
    usable = (amax > 0) & (amax <= _FLOAT32_MAX)
    scale = tl.div_rn(most, tl.where(usable, amax, 1.0))
    scale = tl.where(usable, tl.minimum(scale, _FLOAT32_MAX), 1.0)
    tl.store(out_ptr + 8 * lane, scale)
    tl.store(out_ptr + 8 * lane + 4, tl.div_rn(tl.full((2,), 1.0, tl.float32), scale))


@triton.jit
def _rescale_kernel(z_ptr, a_ptr, b_ptr, size, KIND: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < size
    a, b = tl.load(a_ptr), tl.load(b_ptr)
    z = widen(tl.load(z_ptr + at, mask=live, other=0.0)) * a * b
    z = tl.where(z == z, rounded(z, KIND), z)
    tl.store(z_ptr + at, z.to(z_ptr.dtype.element_ty), mask=live)


def scales_of_amax(amax: torch.Tensor, maximum: float, out: torch.Tensor) -> None:
    """See reference.py."""
    _scales_kernel[(1,)](amax, out, maximum, num_warps=1)


def rescale(z: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """See reference.py."""
    launch = LAUNCHES.pick(z)
    _rescale_kernel[(triton.cdiv(z.numel(), launch.block),)](
        z, a, b, z.numel(), KIND=KINDS[z.dtype], BLOCK=launch.block, num_warps=launch.num_warps
    )
