"""The definitions of current scaling's scales, and of undoing them in a product, in plain torch."""

from __future__ import annotations

import torch

from megasparse.kernels.packed24 import E4M3_MAX

FLOAT32_MAX = torch.finfo(torch.float32).max
# The largest |a| / p of an MVUE draw in units of its group's largest magnitude.
MVUE_BOUND = 2.0


def scales_of_amax(
    amax: torch.Tensor, maximum: float, power_of_two: bool, out: torch.Tensor
) -> None:
    """Column 0 of `out` (4, 4): scale, its reciprocal, and both for draws."""
    for row, factor, most in ((0, 1.0, maximum), (2, MVUE_BOUND, E4M3_MAX)):
        largest = amax[0] * factor
        usable = (largest > 0) & (largest <= FLOAT32_MAX)
        # Not a Python number by a tensor: on CUDA that multiplies by a rounded reciprocal.
        quotient = torch.full_like(largest, most) / largest.masked_fill(~usable, 1.0)
        scale = torch.where(usable, quotient.clamp(max=FLOAT32_MAX), 1.0)
        if power_of_two:
            scale = torch.exp2(torch.frexp(scale).exponent - 1.0).clamp(max=2.0**126)
        out[row, 0] = scale
        out[row + 1, 0] = torch.ones_like(scale) / scale


def rescale(z: torch.Tensor, a: torch.Tensor, b: torch.Tensor, applied_inv: float) -> None:
    """z * ((a * applied_inv) * b), in float32."""
    z.copy_(z.float() * (a * applied_inv * b))
