"""The definition of `spmm24` in plain torch: unpack, multiply in float32, round once."""

from __future__ import annotations

import torch

from megasparse.kernels.packed24 import Packed24


def spmm24(packed: Packed24, x: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """x (T, K) times W^T as (T, N) of `out_dtype`; see `megasparse.kernels.spmm24`."""
    return (x.float() @ packed.dense().float().t()).to(out_dtype)
