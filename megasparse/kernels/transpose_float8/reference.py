"""The definition of `transpose_float8`, in plain torch on bytes."""

from __future__ import annotations

import torch

from megasparse.kernels.token_order import by_groups


def transpose_float8(rows: torch.Tensor) -> torch.Tensor:
    """rows (T, K) of an 8-bit format as (K, T), tokens in the order of strided groups."""
    columns = by_groups(rows.view(torch.uint8)).t().contiguous()
    return columns.view(rows.dtype)
