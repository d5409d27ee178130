"""A sum in place, one pass over flat memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megasparse.kernels.device.groups import rounded, widen
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
    SCALED: tl.constexpr,
    MAY_BEGIN: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < size
    part = widen(tl.load(value + at, mask=live, other=0.0))
    if SCALED:
        part *= tl.load(a_ptr) * applied_inv * tl.load(b_ptr)
    read = live
    if MAY_BEGIN:  # what is not read takes no time
        read = live & (tl.load(begins_ptr) == 0)
    new = widen(tl.load(total + at, mask=read, other=0.0)) + part
    new = tl.where(new == new, rounded(new, KIND), new)
    tl.store(total + at, new.to(total.dtype.element_ty), mask=live)


def accumulate_(
    total: torch.Tensor,
    value: torch.Tensor,
    factors: tuple[torch.Tensor, torch.Tensor, float] | None = None,
    begins: torch.Tensor | None = None,
) -> None:
    """`reference.accumulated`, in place, the factor being `a applied_inv b`."""
    size = total.numel()
    if size == 0:
        return
    launch = LAUNCHES.pick(total)
    a, b, applied_inv = (total, total, 1.0) if factors is None else factors
    _accumulate_kernel[(triton.cdiv(size, launch.block),)](
        total.view(-1),
        value.contiguous().view(-1),
        a,
        b,
        total if begins is None else begins,
        applied_inv,
        size,
        SCALED=factors is not None,
        MAY_BEGIN=begins is not None,
        KIND=KINDS[total.dtype],
        BLOCK=launch.block,
        num_warps=launch.num_warps,
    )
