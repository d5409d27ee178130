"""An 8-bit operand transposed, with its tokens in the order of strided MVUE groups."""

from __future__ import annotations

import torch

from megasparse.errors import KernelError
from megasparse.kernels import dispatch
from megasparse.kernels.packed24 import E4M3
from megasparse.kernels.transpose_float8 import reference, triton

WIDTH_MULTIPLE = 64


@torch.no_grad()
def transpose_float8(rows: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
    """rows (T, K) as (K, T), whose column 4 q + i is token q + i T / 4.

    What `dW = MVUE(dZ^T) X` wants of X where groups are strided; where they are neighbours
    Transformer Engine's transposition serves.

    Args:
        rows: (T, K) float8_e4m3fn, read row-major (copied otherwise); T a multiple of 32, K of 64.
        backend: None, "reference" or "triton".

    Raises: KernelError on sizes, dtype, or a backend that cannot run.
    """
    whole = rows.dim() == 2 and not rows.shape[0] % 32 and not rows.shape[1] % WIDTH_MULTIPLE
    if not whole or rows.dtype != E4M3:
        raise KernelError(
            f"transpose_float8: rows are {rows.dtype} of shape {tuple(rows.shape)}, expected e4m3, "
            f"(T, K), T a multiple of 32 and K of {WIDTH_MULTIPLE}"
        )
    run = dispatch.implementation(
        "transpose_float8",
        rows,
        backend,
        reference=reference.transpose_float8,
        triton=triton.transpose_float8,
    )
    return run(rows)
