"""The definition of `spmm24` in plain torch: unpack, multiply in float32, round once."""

from __future__ import annotations

import torch

from megasparse.kernels.factors import Factors
from megasparse.kernels.packed24 import Packed24
from megasparse.kernels.spmm24.cusparselt_packing import LibraryPacked24


def spmm24(
    packed: Packed24 | LibraryPacked24,
    x: torch.Tensor,
    out_dtype: torch.dtype,
    algorithm: int,
    alpha: float | None,
    bias: torch.Tensor | None,
    bias_factors: Factors | None,
    out: torch.Tensor | None,
) -> torch.Tensor:
    """x (T, K) times W^T as (T, N) of `out_dtype`; see `megasparse.kernels.spmm24`."""
    product = x.float() @ _scaled(packed, alpha).t()
    if bias is not None:
        product = product + _multiplied(bias, bias_factors)
    product = product.to(out_dtype)
    return product if out is None else out.copy_(product)


def matmul24(
    packed: Packed24 | LibraryPacked24,
    b: torch.Tensor,
    transposed: bool,
    out_dtype: torch.dtype,
    algorithm: int,
    alpha: float | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """W (N, K) times b (K, M) as (N, M); see `megasparse.kernels.matmul24`."""
    b = b.float().t() if transposed else b.float()
    product = (_scaled(packed, alpha) @ b).to(out_dtype)
    return product if out is None else out.copy_(product)


def _multiplied(bias: torch.Tensor, factors: Factors | None) -> torch.Tensor:
    if factors is None:
        return bias.float()
    a, b, applied = factors
    return (bias.float() * (a * (1.0 / applied) * b)).to(bias.dtype).float()


def _scaled(packed: Packed24 | LibraryPacked24, alpha: float | None) -> torch.Tensor:
    dense = packed.dense().float()
    return dense if alpha is None else dense / packed.scale * alpha
