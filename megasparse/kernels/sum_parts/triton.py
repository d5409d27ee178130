"""A sum of up to eight tensors, each read once; they may lie in the memory of other GPUs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from megasparse.kernels.device.groups import rounded, widen
from megasparse.kernels.launches import KINDS, Launch, Launches

LAUNCHES = Launches(wide=Launch(block=1024, num_warps=8), narrow=Launch(block=2048, num_warps=8))
MOST = 8


@triton.jit
def _part(part, at, live):
    return widen(tl.load(part + at, mask=live, other=0.0))


@triton.jit
def _sum_parts_kernel(
    out,
    p0,
    p1,
    p2,
    p3,
    p4,
    p5,
    p6,
    p7,
    size,
    COUNT: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < size
    total = _part(p0, at, live)
    if COUNT > 1:
        total += _part(p1, at, live)
    if COUNT > 2:
        total += _part(p2, at, live)
    if COUNT > 3:
        total += _part(p3, at, live)
    if COUNT > 4:
        total += _part(p4, at, live)
    if COUNT > 5:
        total += _part(p5, at, live)
    if COUNT > 6:
        total += _part(p6, at, live)
    if COUNT > 7:
        total += _part(p7, at, live)
    total = tl.where(total == total, rounded(total, KIND), total)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=live)


def sum_parts(parts: Sequence[torch.Tensor], out: torch.Tensor) -> None:
    """See reference.py."""
    size = out.numel()
    if size == 0:
        return
    launch = LAUNCHES.pick(out)
    flat = [part.view(-1) for part in parts]
    _sum_parts_kernel[(triton.cdiv(size, launch.block),)](
        out.view(-1),
        *flat,
        *[flat[0]] * (MOST - len(flat)),
        size,
        COUNT=len(flat),
        KIND=KINDS[out.dtype],
        BLOCK=launch.block,
        num_warps=launch.num_warps,
    )
