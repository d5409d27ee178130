"""The scale that quantises a tensor to e4m3 without saturation."""

from __future__ import annotations

import torch

from megasparse.errors import KernelError
from megasparse.kernels import dispatch
from megasparse.kernels.amax_scale import reference, triton

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@torch.no_grad()
def amax_scale(w: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
    """The dequantisation scale amax / 448 of per-tensor current scaling (S-STE, Hu et al., 2024).

    w: (N, K) float32, bfloat16 or float16, not empty; any row stride, copied unless its rows are
    contiguous. Returns a 0-d float32 tensor on `w`'s device, without a synchronisation: 1 for a
    tensor of zeros, at least 2^-126 (so that its reciprocal is finite), and infinite or NaN when
    `w` holds an infinity or a NaN.

    Raises KernelError for another shape, dtype or backend.
    """
    if w.dim() != 2 or not w.numel() or w.dtype not in DTYPES:
        raise KernelError(
            f"amax_scale: w is {w.dtype} of shape {tuple(w.shape)}, expected a non-empty matrix of "
            "float32, bfloat16 or float16"
        )
    implementation = triton if dispatch.resolve("amax_scale", w, backend) == "triton" else reference
    return implementation.amax_scale(w)
