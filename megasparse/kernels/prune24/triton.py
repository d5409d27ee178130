"""Row-wise 2:4 pruning and the 2:4 test in one pass, on groups held in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megasparse.kernels.device.groups import load_bits, magnitude, nan_limit, raise_flag
from megasparse.kernels.launches import KINDS, Launch, Launches, group_words

# In groups. Narrow: 8 a thread, loads and stores of 16 bytes.
LAUNCHES = Launches(wide=Launch(block=256, num_warps=8), narrow=Launch(block=1024, num_warps=4))


@triton.jit
def _majority(x, y, z):
    """Bit by bit; one instruction on a GPU."""
    return (x & y) | (z & (x | y))


@triton.jit
def _prune24_kernel(w, mask, flag, groups, KIND: tl.constexpr, BLOCK: tl.constexpr):
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = group < groups
    a, b, c, d = load_bits(w, group, live, KIND)
    a, b, c, d = magnitude(a), magnitude(b), magnitude(c), magnitude(d)
    # As in the reference: an entry stays when it beats two others; of equals the later one wins.
    # Only the sign bit counts: that of b - a says a > b, its inverse b >= a.
    ab, ac, ad, bc, bd, cd = b - a, c - a, d - a, c - b, d - b, d - c
    keep_a = _majority(ab, ac, ad)
    keep_b = _majority(~ab, bc, bd)
    keep_c = _majority(~ac, ~bc, cd)
    keep_d = _majority(~ad, ~bd, ~cd)
    word = ((keep_a >> 31) & 1) | ((keep_b >> 23) & (1 << 8))
    word |= ((keep_c >> 15) & (1 << 16)) | ((keep_d >> 7) & (1 << 24))
    tl.store(mask + group, word, mask=live)
    top = tl.maximum(tl.maximum(a, b), tl.maximum(c, d))
    raise_flag(flag, (top > nan_limit(KIND)).to(tl.int32))


@triton.jit
def _is_24_kernel(w, flag, groups, KIND: tl.constexpr, BLOCK: tl.constexpr):
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = group < groups
    a, b, c, d = load_bits(w, group, live, KIND)
    a, b, c, d = magnitude(a) != 0, magnitude(b) != 0, magnitude(c) != 0, magnitude(d) != 0
    raise_flag(flag, ((a & b & (c | d)) | (c & d & (a | b))).to(tl.int32))


def prune24(w: torch.Tensor, flag: torch.Tensor) -> torch.Tensor:
    """`reference.prune24`; sets `flag` (int32, 1 element) to 1 when `w` holds a NaN."""
    mask = torch.empty(w.shape, dtype=torch.bool, device=w.device)
    groups = w.numel() // 4
    if groups:
        launch = LAUNCHES.pick(w)
        _prune24_kernel[(triton.cdiv(groups, launch.block),)](
            group_words(w),
            mask.view(-1).view(torch.int32),
            flag,
            groups,
            KIND=KINDS[w.dtype],
            BLOCK=launch.block,
            num_warps=launch.num_warps,
        )
    return mask


def is_24(w: torch.Tensor) -> bool:
    """`reference.is_24`, for `w` (..., K)."""
    flag = torch.zeros(1, dtype=torch.int32, device=w.device)
    groups = w.numel() // 4
    launch = LAUNCHES.pick(w)
    _is_24_kernel[(triton.cdiv(groups, launch.block),)](
        group_words(w),
        flag,
        groups,
        KIND=KINDS[w.dtype],
        BLOCK=launch.block,
        num_warps=launch.num_warps,
    )
    return not flag.item()
