"""`spmm24` and `matmul24` by cuSPARSELt, bound directly (binding.py).

The library multiplies sparse (N, K) by dense (K, M). For `spmm24` its result is asked for column by
column, which is the row-major (T, N) that torch wants. Rows of a dense operand must be multiples of
16 bytes.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from megasparse.errors import KernelError
from megasparse.kernels.factors import Factors
from megasparse.kernels.packed24 import E4M3, Packed24
from megasparse.kernels.spmm24.binding import Problem, plan
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
    if x.dtype != packed.dtype:
        raise KernelError(
            f"spmm24: x is {x.dtype} and the packed matrix {packed.dtype}, expected the same "
            "for cusparselt"
        )
    rows, columns = packed.shape
    tokens = x.shape[0]
    missing = -tokens % (16 // x.dtype.itemsize)
    if out is not None and (missing or not out.is_contiguous()):
        raise KernelError(
            f"spmm24: out of {tokens} tokens, strides {out.stride()}, expected a contiguous one of "
            f"a multiple of {16 // x.dtype.itemsize} for cusparselt"
        )
    if missing:  # zero rows as bytes: torch does not pad e4m3
        x = pad(x.contiguous().view(torch.uint8), (0, 0, 0, missing)).view(x.dtype)
    elif not x.is_contiguous():
        x = x.contiguous()
    if out is None:
        out = x.new_empty((tokens + missing, rows), dtype=out_dtype)
    problem = Problem(
        rows,
        columns,
        tokens + missing,
        packed.dtype,
        x.dtype,
        out_dtype,
        False,
        False,
        algorithm,
        bias is not None,
    )
    made = plan(problem, x.device)
    if bias is not None:
        made.set_bias(bias, bias_factors)
    made.run(packed.buffer, x, out, _alpha(packed, alpha))
    return out[:tokens] if missing else out


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
    if b.dtype != packed.dtype:
        raise KernelError(
            f"matmul24: b is {b.dtype} and the packed matrix {packed.dtype}, expected the same "
            "for cusparselt"
        )
    if b.dtype == E4M3 and not transposed:
        raise KernelError("matmul24: an e4m3 b must be given transposed (M, K) to cusparselt")
    rows, inner = packed.shape
    columns = b.shape[0] if transposed else b.shape[1]
    multiple = 16 // min(b.dtype.itemsize, out_dtype.itemsize)
    missing = -columns % multiple
    if out is not None and (missing or not out.is_contiguous()):
        raise KernelError(
            f"matmul24: out of {columns} columns, strides {out.stride()}, expected a contiguous "
            f"one of a multiple of {multiple} for cusparselt"
        )
    if missing:
        edge = (0, 0, 0, missing) if transposed else (0, missing)
        kind = torch.uint8 if b.dtype == E4M3 else b.dtype
        b = pad(b.contiguous().view(kind), edge).view(b.dtype)
    elif not b.is_contiguous():
        b = b.contiguous()
    if out is None:
        out = b.new_empty((rows, columns + missing), dtype=out_dtype)
    problem = Problem(
        rows,
        inner,
        columns + missing,
        packed.dtype,
        b.dtype,
        out_dtype,
        not transposed,
        True,
        algorithm,
    )
    plan(problem, b.device).run(packed.buffer, b, out, _alpha(packed, alpha))
    return out[:, :columns] if missing else out


def _alpha(packed: Packed24 | LibraryPacked24, alpha: float | None) -> float:
    if alpha is not None:
        return alpha
    return 1.0 if packed.dtype.itemsize == 2 else float(packed.scale)
