"""Sparse times dense: the GEMM of a packed 2:4 matrix."""

from __future__ import annotations

import torch

from megasparse.errors import KernelError
from megasparse.kernels import dispatch
from megasparse.kernels.checks import require
from megasparse.kernels.factors import Factors
from megasparse.kernels.packed24 import E4M3, Packed24
from megasparse.kernels.spmm24 import cusparselt, reference
from megasparse.kernels.spmm24.cusparselt_packing import LibraryPacked24

DTYPES = (torch.float32, torch.bfloat16, torch.float16, E4M3)


@torch.no_grad()
def spmm24(
    packed: Packed24 | LibraryPacked24,
    x: torch.Tensor,
    *,
    out_dtype: torch.dtype | None = None,
    algorithm: int = 0,
    alpha: float | None = None,
    bias: torch.Tensor | None = None,
    bias_factors: Factors | None = None,
    out: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """x @ W^T + bias with W (N, K) packed 2:4, its scale included; accumulation in float32.

    Args:
        packed: W as `pack24` made it, or `pack24_by_library`.
        x: (T, K), any T. float32, bfloat16, float16 or float8_e4m3fn; on cuSPARSELt the dtype of
            `packed`. Row-major without a copy. T is padded to a multiple of 8 (16-bit) or 16
            (8-bit) on cuSPARSELt.
        out_dtype: x's dtype by default; bfloat16 for an e4m3 x, whose own scale, if it has one, is
            the caller's to apply.
        algorithm: of cuSPARSELt; one that it does not have raises RuntimeError.
        alpha: factor of `values @ x^T` in place of the packed scale. cuSPARSELt takes it from the
            host: without it an 8-bit product waits for the device, to read `packed.scale`.
        bias: (N,), added before the sum is rounded; on cuSPARSELt of `out_dtype`.
        bias_factors: the bias is multiplied by them before, as `accumulate_` does.
        out: (T, N) of `out_dtype`, contiguous: gets the result; on cuSPARSELt T needs no padding.
        backend: None, "reference" or "cusparselt" (CUDA tensors).

    Returns: `out`, or a new (T, N), row-major, outside autograd.

    Raises: KernelError when shapes, dtypes or devices do not fit or the backend cannot run.
    """
    if x.dim() != 2 or x.shape[1] != packed.shape[1]:
        raise KernelError(
            f"spmm24: x has shape {tuple(x.shape)}, expected (tokens, {packed.shape[1]})"
        )
    if x.dtype not in DTYPES:
        raise KernelError(f"spmm24: x is {x.dtype}, expected one of float32, 16 bits or e4m3")
    if x.device != packed.values.device:
        raise KernelError(f"spmm24: x is on {x.device}, expected {packed.values.device}")
    if out_dtype is None:
        out_dtype = torch.bfloat16 if x.dtype == E4M3 else x.dtype
    multiply = dispatch.implementation(
        "spmm24", x, backend, reference=reference.spmm24, cusparselt=cusparselt.spmm24
    )
    if bias is not None and (bias.shape != packed.shape[:1] or bias.device != x.device):
        raise KernelError(
            f"spmm24: bias of shape {tuple(bias.shape)} on {bias.device}, expected "
            f"({packed.shape[0]},) on {x.device}"
        )
    require("spmm24", "out", out, out_dtype, (x.shape[0], packed.shape[0]), x.device)
    if x.shape[0] == 0:
        return x.new_empty((0, packed.shape[0]), dtype=out_dtype)
    return multiply(packed, x, out_dtype, algorithm, alpha, bias, bias_factors, out)


@torch.no_grad()
def matmul24(
    packed: Packed24 | LibraryPacked24,
    b: torch.Tensor,
    *,
    transposed: bool = False,
    out_dtype: torch.dtype | None = None,
    algorithm: int = 0,
    alpha: float | None = None,
    out: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """W @ b with W (N, K) packed 2:4: the weight gradient's GEMM, dW = MVUE(dZ^T) X.

    Args:
        packed: W as `pack24` made it, or `pack24_by_library`.
        b: (K, M), row-major, or (M, K) when `transposed`, as 8-bit operands on cuSPARSELt must be;
            there of the dtype of `packed`.
        transposed: b is given transposed.
        out: (N, M) of `out_dtype`, contiguous: gets the result; on cuSPARSELt M needs no padding.
        out_dtype, algorithm, alpha, backend: as in `spmm24`.

    Returns: `out`, or a new (N, M), accumulated in float32, outside autograd.

    Raises: KernelError when shapes, dtypes or devices do not fit or the backend cannot run.
    """
    inner = b.shape[-1 if transposed else 0]
    if b.dim() != 2 or inner != packed.shape[1]:
        expected = (
            f"(columns, {packed.shape[1]})" if transposed else f"({packed.shape[1]}, columns)"
        )
        raise KernelError(f"matmul24: b has shape {tuple(b.shape)}, expected {expected}")
    if b.device != packed.values.device:
        raise KernelError(f"matmul24: b is on {b.device}, expected {packed.values.device}")
    if out_dtype is None:
        out_dtype = torch.bfloat16 if b.dtype == E4M3 else b.dtype
    multiply = dispatch.implementation(
        "matmul24", b, backend, reference=reference.matmul24, cusparselt=cusparselt.matmul24
    )
    columns = b.shape[0 if transposed else 1]
    require("matmul24", "out", out, out_dtype, (packed.shape[0], columns), b.device)
    return multiply(packed, b, transposed, out_dtype, algorithm, alpha, out)
