"""Does the library pack a matrix as our kernels do? Asked once a process, GPU and format.

The packed layout is not documented; another GPU generation or library version may have another.
"""

from __future__ import annotations

import functools

import torch

from megasparse.kernels.pack24 import pack24
from megasparse.kernels.prune24 import prune24_mask


@functools.cache
def packing_disagreement(device: torch.device, dtype: torch.dtype) -> str | None:
    """What differs between `pack24` and cuSPARSELt's own packing of a random matrix, or None.

    Args:
        device: a GPU.
        dtype: bfloat16, float16 or float8_e4m3fn.
    """
    generator = torch.Generator(device).manual_seed(24)
    w = torch.randn(192, 384, generator=generator, device=device)
    w = torch.where(prune24_mask(w), w, torch.zeros_like(w)).to(dtype)
    ours = pack24(w).buffer
    try:
        theirs = torch._cslt_compress(w).view(torch.uint8).reshape(-1)
    except RuntimeError as error:
        return f"cuSPARSELt cannot pack {dtype}: {' '.join(str(error).split())}"
    return difference(ours, theirs, dtype)


def difference(ours: torch.Tensor, theirs: torch.Tensor, dtype: torch.dtype) -> str | None:
    """One line on two packed buffers (bytes) that are not equal, or None."""
    if ours.shape != theirs.shape:
        return f"cuSPARSELt packs {dtype} into {theirs.numel()} bytes, expected {ours.numel()}"
    unlike = int((ours != theirs).sum())
    if unlike:
        first = int((ours != theirs).nonzero()[0])
        return (
            f"cuSPARSELt packs {dtype} in another layout: {unlike} of {ours.numel()} bytes differ, "
            f"the first at {first}"
        )
    return None
