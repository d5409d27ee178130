"""Conversion to the 8-bit floating-point formats, with saturation."""

from __future__ import annotations

import torch

from megasparse.kernels.packed24 import E4M3, E4M3_MAX

E5M2 = torch.float8_e5m2
# The largest finite number of each format.
MAXIMUM = {E4M3: E4M3_MAX, E5M2: 57344.0}


def quantise(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`x * scale` as e4m3 or e5m2, to nearest even, saturated (infinities too); NaN stays NaN.

    x: any shape, any floating type up to float32; scale: 0-d float32, the multiplier.
    """
    most = MAXIMUM[dtype]
    return (x.float() * scale).clamp(-most, most).to(dtype)
