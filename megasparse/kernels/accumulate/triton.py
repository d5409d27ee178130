"""A sum in place, one pass over flat memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megasparse.kernels.device.groups import rounded, widen
from megasparse.kernels.launches import KINDS, Launch, Launches

LAUNCHES = Launches(wide=Launch(block=2048, num_warps=8), narrow=Launch(block=2048, num_warps=8))


@triton.jit
def _accumulate_kernel(total, value, size, KIND: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < size
    old = widen(tl.load(total + at, mask=live, other=0.0))
    new = old + widen(tl.load(value + at, mask=live, other=0.0))
    new = tl.where(new == new, rounded(new, KIND), new)
    tl.store(total + at, new.to(total.dtype.element_ty), mask=live)


def accumulate_(total: torch.Tensor, value: torch.Tensor) -> None:
    """`reference.accumulated`, in place."""
    size = total.numel()
    if size == 0:
        return
    launch = LAUNCHES.pick(total)
    _accumulate_kernel[(triton.cdiv(size, launch.block),)](
        total.view(-1),
        value.contiguous().view(-1),
        size,
        KIND=KINDS[total.dtype],
        BLOCK=launch.block,
        num_warps=launch.num_warps,
    )
