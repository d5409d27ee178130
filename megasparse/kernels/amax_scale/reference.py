"""The definition of `amax_scale` in plain torch."""

from __future__ import annotations

import torch

from megasparse.kernels.packed24 import E4M3_MAX, SMALLEST_SCALE


def amax_scale(w: torch.Tensor) -> torch.Tensor:
    """0-d float32: amax / 448; 1 when `w` is zero, and never so small that 1 / scale overflows."""
    amax = torch.linalg.vector_norm(w, float("inf")).float()
    # Not `amax / 448`: on CUDA torch multiplies by the rounded reciprocal of a Python number.
    scale = (amax / torch.full_like(amax, E4M3_MAX)).clamp(min=SMALLEST_SCALE)
    return torch.where(amax == 0, 1.0, scale)
