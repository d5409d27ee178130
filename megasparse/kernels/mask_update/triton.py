"""A new mask in the place of the old one, in one pass over both."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megasparse.kernels.launches import Launch, Launches, group_words

# In groups of 4 entries, a word of each mask.
LAUNCHES = Launches(wide=Launch(block=2048, num_warps=4), narrow=Launch(block=2048, num_warps=4))


@triton.jit
def _replace_mask_kernel(mask, new, before, counts, words, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    at = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < words
    old = tl.load(mask + at, mask=live, other=0)
    now = tl.load(new + at, mask=live, other=0)
    # Bytes are 0 or 1: the product's highest byte is the sum of the four.
    tl.store(counts + pid, tl.sum(((old ^ now) * 0x01010101) >> 24))
    bits = (old | (old >> 7) | (old >> 14) | (old >> 21)) & 15
    tl.store(before + at, bits.to(tl.uint8), mask=live)
    tl.store(mask + at, now, mask=live)


def replace_mask_(mask: torch.Tensor, new: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """`reference.replaced`, with both written in place."""
    words = before.numel()
    if words == 0:
        return torch.zeros((), dtype=torch.int64, device=mask.device)
    launch = LAUNCHES.pick(mask)
    programs = triton.cdiv(words, launch.block)
    counts = torch.empty(programs, dtype=torch.int32, device=mask.device)
    aligned = mask.data_ptr() % 4 == 0
    target = mask if aligned else mask.clone()
    _replace_mask_kernel[(programs,)](
        group_words(target),
        group_words(new),
        before,
        counts,
        words,
        BLOCK=launch.block,
        num_warps=launch.num_warps,
    )
    if not aligned:
        mask.copy_(target)
    return counts.sum()
