"""The definitions of current scaling's scales, and of undoing them in a product, in plain torch."""

from __future__ import annotations

import torch

from megasparse.kernels.packed24 import E4M3_MAX, SMALLEST_SCALE_INV

FLOAT32_MAX = torch.finfo(torch.float32).max
# The largest |a| / p of an MVUE draw in units of its group's largest magnitude.
MVUE_BOUND = 2.0


def scale_inv_of(w: torch.Tensor) -> torch.Tensor:
    """0-d float32: amax / 448; 1 when `w` is zero; never so small that its inverse overflows."""
    amax = torch.linalg.vector_norm(w, float("inf")).float()
    # Not `amax / 448`: on CUDA torch multiplies by the rounded reciprocal of a Python number.
    scale_inv = (amax / torch.full_like(amax, E4M3_MAX)).clamp(min=SMALLEST_SCALE_INV)
    return torch.where(amax == 0, 1.0, scale_inv)


def scales_of_amax(
    amax: torch.Tensor, maximum: float, power_of_two: bool
) -> tuple[torch.Tensor, ...]:
    """0-d float32: scale, its reciprocal, and both for draws."""
    scale = _scale(amax[0], maximum, power_of_two)
    draw_scale = _scale(amax[0] * MVUE_BOUND, E4M3_MAX, power_of_two)
    return scale, scale.reciprocal(), draw_scale, draw_scale.reciprocal()


def _scale(amax: torch.Tensor, maximum: float, power_of_two: bool) -> torch.Tensor:
    usable = (amax > 0) & (amax <= FLOAT32_MAX)
    # Not a Python number by a tensor: on CUDA that multiplies by a rounded reciprocal.
    quotient = torch.full_like(amax, maximum) / amax.masked_fill(~usable, 1.0)
    scale = torch.where(usable, quotient.clamp(max=FLOAT32_MAX), 1.0)
    if not power_of_two:
        return scale
    return torch.exp2(torch.frexp(scale).exponent - 1.0).clamp(max=2.0**126)


def rescaled(z: torch.Tensor, a: torch.Tensor, b: torch.Tensor, applied_inv: float) -> torch.Tensor:
    """z * ((a * applied_inv) * b) in float32, rounded to z's dtype."""
    return (z.float() * (a * applied_inv * b)).to(z.dtype)
