"""`spmm24` by cuSPARSELt, through torch's wrapper.

The library multiplies sparse (N, K) by dense (K, T). Its result is asked for transposed, which
makes the (T, N) that torch wants row-major without a copy. Traps of the wrapper (torch 2.11,
cuSPARSELt 0.8): an e5m2 operand is read as e4m3 without an error, so both dtypes are checked here;
8-bit operands must both run along K, which x.t() of a row-major x does; T must be a multiple of 16
bytes of x.

An e4m3 call waits for the device: the scale goes in as `alpha`, and the wrapper reads a one-element
alpha on the host, after everything queued before it. The library refuses a vector of alphas (which
would stay on the device) for 8-bit operands: "operation not supported ... ALPHA_VECTOR_SCALING".
16-bit calls pass no alpha and do not wait.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from megasparse.errors import KernelError
from megasparse.kernels.packed24 import E4M3, Packed24


def spmm24(
    packed: Packed24, x: torch.Tensor, out_dtype: torch.dtype, algorithm: int
) -> torch.Tensor:
    """x (T, K) times W^T as (T, N) of `out_dtype`; see `megasparse.kernels.spmm24`."""
    if x.dtype != packed.dtype:
        raise KernelError(
            f"spmm24: x is {x.dtype} and the packed matrix {packed.dtype}, expected the same "
            "for cusparselt"
        )
    if packed.dtype != E4M3 and out_dtype != x.dtype:
        raise KernelError(f"spmm24: out_dtype is {out_dtype}, expected {x.dtype} for cusparselt")
    tokens = x.shape[0]
    multiple = 16 // x.dtype.itemsize
    # Zero rows as bytes: torch does not pad e4m3. Two rows at least, for one row has no strides.
    missing = -tokens % multiple
    if missing:
        x = pad(x.contiguous().view(torch.uint8), (0, 0, 0, missing)).view(x.dtype)
    rows = packed.shape[0]
    eight_bit = packed.dtype == E4M3
    out = torch._cslt_sparse_mm(
        packed.buffer.view(packed.dtype).view(rows, -1),
        x.contiguous().t(),
        alpha=packed.scale.reshape(1) if eight_bit else None,
        out_dtype=out_dtype if eight_bit else None,
        transpose_result=True,
        alg_id=algorithm,
    )
    return out[:tokens]


def matmul24(packed: Packed24, b: torch.Tensor, algorithm: int) -> torch.Tensor:
    """W (N, K) times b (K, M), 16-bit; see `megasparse.kernels.matmul24`."""
    if b.dtype != packed.dtype or packed.dtype == E4M3:
        raise KernelError(
            f"matmul24: b is {b.dtype} and the packed matrix {packed.dtype}, expected the same "
            "16-bit dtype for cusparselt"
        )
    columns = b.shape[1]
    missing = -columns % 8
    if missing:
        b = pad(b, (0, missing))
    rows = packed.shape[0]
    out = torch._cslt_sparse_mm(
        packed.buffer.view(packed.dtype).view(rows, -1), b.contiguous(), alg_id=algorithm
    )
    return out[:, :columns]
