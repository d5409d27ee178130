"""The definition of `spmm24` in plain torch: unpack, multiply in float32, round once."""

from __future__ import annotations

import torch

from megasparse.kernels.packed24 import Packed24


def spmm24(
    packed: Packed24, x: torch.Tensor, out_dtype: torch.dtype, algorithm: int
) -> torch.Tensor:
    """x (T, K) times W^T as (T, N) of `out_dtype`; see `megasparse.kernels.spmm24`."""
    return (x.float() @ packed.dense().float().t()).to(out_dtype)


def matmul24(packed: Packed24, b: torch.Tensor, algorithm: int) -> torch.Tensor:
    """W (N, K) times b (K, M) in b's dtype; see `megasparse.kernels.matmul24`."""
    return (packed.dense().float() @ b.float()).to(b.dtype)
