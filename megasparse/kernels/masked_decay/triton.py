"""Masked decay and the flip count, one pass over flat memory each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megasparse.kernels.device.groups import from_fp32, to_fp32
from megasparse.kernels.launches import KINDS, Launch, Launches, group_words

# In entries: 16 bytes of the gradient a thread.
DECAY_LAUNCHES = Launches(
    wide=Launch(block=1024, num_warps=8), narrow=Launch(block=2048, num_warps=8)
)
# In words of 4 mask bytes: 16 a thread.
FLIP_LAUNCHES = Launches(
    wide=Launch(block=2048, num_warps=4), narrow=Launch(block=2048, num_warps=4)
)
_BITS = {4: torch.int32, 2: torch.int16}


@triton.jit
def _masked_decay_kernel(
    grad, w, mask, decay, size, GRAD: tl.constexpr, WEIGHT: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < size
    grad_shift: tl.constexpr = 32 - grad.dtype.element_ty.primitive_bitwidth
    weight_shift: tl.constexpr = 32 - w.dtype.element_ty.primitive_bitwidth
    old = tl.load(grad + at, mask=live, other=0).to(tl.int32) << grad_shift
    weight = tl.load(w + at, mask=live, other=0).to(tl.int32) << weight_shift
    kept = tl.load(mask + at, mask=live, other=0) != 0
    decayed = to_fp32(old, GRAD) + to_fp32(weight, WEIGHT) * decay
    quiet_nan = 0x7FC00000 if GRAD != "fp16" else 0x7E000000
    new = tl.where(decayed != decayed, quiet_nan, from_fp32(decayed, GRAD))
    # Kept entries are stored as the bits that were loaded: full-width stores, nothing changes.
    bits = tl.where(kept, old, new) >> grad_shift
    tl.store(grad + at, bits.to(grad.dtype.element_ty), mask=live)


@triton.jit
def _count_flips_kernel(mask_a, mask_b, counts, words, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    at = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < words
    differ = tl.load(mask_a + at, mask=live, other=0) ^ tl.load(mask_b + at, mask=live, other=0)
    # Bytes are 0 or 1: the product's highest byte is the sum of the four.
    tl.store(counts + pid, tl.sum((differ * 0x01010101) >> 24))


def masked_decay_(grad: torch.Tensor, w: torch.Tensor, mask: torch.Tensor, decay: float) -> None:
    """`reference.masked_decay`, in place.

    The kernel walks `grad`'s memory; `w` and `mask` are copied when laid out differently, and a
    `grad` with gaps goes through a contiguous copy.
    """
    if grad.numel() == 0:
        return
    order = sorted(range(grad.dim()), key=grad.stride, reverse=True)
    grad, w, mask = (tensor.permute(order) for tensor in (grad, w, mask))
    target, w, mask = grad.contiguous(), w.contiguous(), mask.contiguous()
    launch = DECAY_LAUNCHES.pick(grad)
    _masked_decay_kernel[(triton.cdiv(grad.numel(), launch.block),)](
        target.view(-1).view(_BITS[grad.itemsize]),
        w.view(-1).view(_BITS[w.itemsize]),
        mask.view(-1).view(torch.uint8),
        float(decay),
        grad.numel(),
        GRAD=KINDS[grad.dtype],
        WEIGHT=KINDS[w.dtype],
        BLOCK=launch.block,
        num_warps=launch.num_warps,
        enable_fp_fusion=False,  # product and sum are rounded one after the other
    )
    if target.data_ptr() != grad.data_ptr():
        grad.copy_(target)


def count_flips(mask_a: torch.Tensor, mask_b: torch.Tensor) -> torch.Tensor:
    """`reference.count_flips`. Masks that are not contiguous are copied first."""
    flat_a, flat_b = mask_a.contiguous().view(-1), mask_b.contiguous().view(-1)
    words = flat_a.numel() // 4
    flips = torch.count_nonzero(flat_a[4 * words :] ^ flat_b[4 * words :])
    if words == 0:
        return flips
    launch = FLIP_LAUNCHES.pick(flat_a)
    programs = triton.cdiv(words, launch.block)
    counts = torch.empty(programs, dtype=torch.int32, device=mask_a.device)
    _count_flips_kernel[(programs,)](
        group_words(flat_a[: 4 * words]),
        group_words(flat_b[: 4 * words]),
        counts,
        words,
        BLOCK=launch.block,
        num_warps=launch.num_warps,
    )
    return flips + counts.sum()
