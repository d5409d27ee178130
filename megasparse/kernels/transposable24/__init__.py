"""The transposable 2:4 mask: 2:4 along the rows and along the columns at once."""

from __future__ import annotations

import torch

from megasparse.kernels.checks import check_groups, run_pruning
from megasparse.kernels.transposable24 import reference, triton


def transposable24_mask(
    w: torch.Tensor, *, backend: str | None = None, nan_flag: torch.Tensor | None = None
) -> torch.Tensor:
    """Exact best of the 90 transposable patterns in each 4x4 block, by the sum of kept |w|.

    w: (..., N, K) float32, bfloat16, float16 or float8_e4m3fn, N and K multiples of 4; a tensor
    that is not contiguous is copied first. Returns bool of `w`'s shape, contiguous, with exactly
    two True in every row and every column of every block (FST, Hu et al., ICML 2024).

    The sum is `(row0[p] + row1[q]) + (row2[r] + row3[s])` over the pairs p, q, r, s kept in the
    four rows, each pair summed lower column first, every addition rounded to float32. Of equal
    sums the first pattern in lexicographic descending order wins (1100/1100/0011/0011 first); sums
    that are infinite are equal.

    nan_flag: None, or int32 with 1 element on `w`'s device. Triton sets it to 1 when `w` holds a
    NaN, without synchronizing; the mask is then meaningless.
    Raises KernelError for another dtype, shape or backend; NumericsError for a NaN when `nan_flag`
    is None, and on CPU with the reference.
    """
    check_groups("transposable24_mask", w, blocks=True)
    flat = w.reshape(-1, w.shape[-1])
    mask = run_pruning(
        "transposable24_mask",
        flat,
        backend=backend,
        nan_flag=nan_flag,
        reference=reference.transposable24,
        kernel=triton.transposable24,
    )
    return mask.view(w.shape)
