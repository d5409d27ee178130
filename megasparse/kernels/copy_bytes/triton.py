"""A copy of contiguous memory, in words of 8 bytes where it has them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megasparse.kernels.launches import Launch

LAUNCH = Launch(block=1024, num_warps=8)


@triton.jit
def _copy_kernel(out, source, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < size
    tl.store(out + at, tl.load(source + at, mask=live), mask=live)


def copy_bytes_(out: torch.Tensor, source: torch.Tensor) -> None:
    """`reference.copied`, to `out`."""
    whole = all(t.nbytes % 8 == 0 and t.data_ptr() % 8 == 0 for t in (out, source))
    words = torch.int64 if whole else torch.uint8
    to, of = (t.view(-1).view(torch.uint8).view(words) for t in (out, source))
    if to.numel():
        grid = (triton.cdiv(to.numel(), LAUNCH.block),)
        _copy_kernel[grid](to, of, to.numel(), BLOCK=LAUNCH.block, num_warps=LAUNCH.num_warps)
