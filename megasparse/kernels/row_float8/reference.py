"""The definitions of rows in e4m3, and of undoing their scaling, in plain torch."""

from __future__ import annotations

import torch

from megasparse.kernels.packed24 import E4M3, E4M3_MAX

LARGEST_SCALE = 2.0**126  # its reciprocal is a normal number


def quantize_rows(x: torch.Tensor, padded: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(T', K) in e4m3 and float32 (T,); see `megasparse.kernels.row_float8`."""
    wide = x.float()
    amax = wide.abs().amax(1)
    usable = (amax > 0) & amax.isfinite()
    # amax = fraction * 2^exponent, and 448 = 0.875 * 2^9.
    fraction, exponent = torch.frexp(amax.masked_fill(~usable, 448.0))
    scale = torch.exp2(9.0 - exponent - (fraction > 0.875).float()).clamp(max=LARGEST_SCALE)
    cast = (wide * scale[:, None]).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)
    # By bytes: torch neither fills nor copies every 8-bit format everywhere.
    rows = torch.zeros((padded, x.shape[1]), dtype=torch.uint8, device=x.device)
    rows[: x.shape[0]] = cast.view(torch.uint8)
    unusable = ~amax.isfinite()
    return rows.view(E4M3), scale.reciprocal().masked_fill(unusable, float("nan"))


def rescaled_rows(
    z: torch.Tensor, scale_inv: torch.Tensor, bias: torch.Tensor | None, applied_inv: float
) -> torch.Tensor:
    """z times (scale_inv * applied_inv), row by row, plus bias in float32, in z's dtype."""
    undone = z.float() * (scale_inv * applied_inv)[:, None]
    return (undone if bias is None else undone + bias.float()).to(z.dtype)
