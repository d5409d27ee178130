"""The definition of `pack24` in plain torch; where codes lie in memory is in packed24.py."""

from __future__ import annotations

import torch

from megasparse.kernels.float8 import quantize
from megasparse.kernels.packed24 import Packed24, join_packed

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}  # torch does not gather e4m3


def pack24(
    w: torch.Tensor, dtype: torch.dtype, scale_inv: torch.Tensor
) -> tuple[Packed24, torch.Tensor]:
    """w (N, K) packed as `dtype`: as it is, or, when it is wider, times 1 / `scale_inv`, saturated.

    Returns: the packed w; 0-d bool, whether a group has more than two non-zeros.
    """
    groups = w.reshape(w.shape[0], w.shape[1] // 4, 4)
    n0, n1, n2, n3 = (groups.float() != 0).unbind(-1)
    count = n0.int() + n1.int() + n2.int()
    # The first non-zero (2 if it is not 0 or 1) and the last column that completes two: with
    # fewer than two non-zeros, zeros fill up from the end of the group.
    i0 = torch.where(n0, 0, torch.where(n1, 1, 2))
    i1 = torch.where(n3 | (count < 2), 3, torch.where(n2, 2, 1))
    kept = groups.view(_BITS[w.itemsize]).gather(-1, torch.stack([i0, i1], -1)).view(w.dtype)
    values = kept if w.dtype == dtype else quantize(kept, scale_inv.reciprocal(), dtype)
    codes = (i0 | i1 << 2).to(torch.uint8)
    crowded = (count + n3.int() > 2).any()
    return join_packed(values.reshape(w.shape[0], -1), codes, scale_inv), crowded


def unpack24(packed: Packed24) -> torch.Tensor:
    """The dense (N, K) matrix: of packed.dtype for 16 bits, float32 (values * scale) for 8."""
    return packed.dense()
