"""A sum in place, one pass over flat memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megasparse.kernels.device.float8 import product_factor
from megasparse.kernels.device.groups import rounded, widen
from megasparse.kernels.factors import NOTHING, Lacking
from megasparse.kernels.launches import KINDS, Launch, Launches

LAUNCHES = Launches(wide=Launch(block=2048, num_warps=8), narrow=Launch(block=2048, num_warps=8))


@triton.jit
def _accumulate_kernel(
    total,
    value,
    a_ptr,
    b_ptr,
    begins_ptr,
    applied_inv,
    size,
    MAY_BEGIN: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < size
    part = widen(tl.load(value + at, mask=live, other=0.0))
    part *= product_factor(a_ptr, b_ptr, applied_inv)
    read = live
    if MAY_BEGIN:  # what is not read takes no time
        read = live & (tl.load(begins_ptr) == 0)
    new = widen(tl.load(total + at, mask=read, other=0.0)) + part
    new = tl.where(new == new, rounded(new, KIND), new)
    tl.store(total + at, new.to(total.dtype.element_ty), mask=live)


def accumulate_(
    total: torch.Tensor,
    value: torch.Tensor,
    factors: Lacking = NOTHING,
    begins: torch.Tensor | None = None,
) -> None:
    """`reference.accumulated`, in place, the factor being `a applied_inv b`."""
    size = total.numel()
    if size == 0:
        return
    launch = LAUNCHES.pick(total)
    _accumulate_kernel[(triton.cdiv(size, launch.block),)](
        total.view(-1),
        value.contiguous().view(-1),
        *factors[:2],
        total if begins is None else begins,
        factors[2],
        size,
        MAY_BEGIN=begins is not None,
        KIND=KINDS[total.dtype],
        BLOCK=launch.block,
        num_warps=launch.num_warps,
    )
