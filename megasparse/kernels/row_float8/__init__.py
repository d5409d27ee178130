"""Rows of a matrix in e4m3, each scaled by its own largest magnitude, and undoing that.

For inference: a token's numbers do not depend on the tokens beside it. One pass finds the
magnitude, scales and casts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from megasparse.errors import KernelError
from megasparse.kernels import dispatch
from megasparse.kernels.checks import WIDE_DTYPES, require, require_power_of_two
from megasparse.kernels.row_float8 import reference, triton

# A program holds a whole row.
LONGEST_ROW = 1 << 16


class RowFloat8(NamedTuple):
    """A matrix in e4m3.

    Attributes:
        rows: (T', K) float8_e4m3fn; zeros after row T.
        scale_inv: (T,) float32, powers of two: x = rows * scale_inv.
    """

    rows: torch.Tensor
    scale_inv: torch.Tensor


@torch.no_grad()
def quantize_rows(x: torch.Tensor, *, multiple: int = 16, backend: str | None = None) -> RowFloat8:
    """x (T, K) in e4m3: to nearest even, row t times the largest power of two <= 448 / max |x_t|.

    A row of zeros has the factor 1. A row that holds an infinity or NaN has a `scale_inv` of NaN,
    so that no product of it is finite. Nothing waits for the device.

    Args:
        x: bfloat16, float16 or float32; K at most 65,536; copied unless its rows are contiguous.
        multiple: T' is T up to a multiple of it: 16 is what an 8-bit `spmm24` wants.

    Raises: KernelError for another shape, dtype or backend.
    """
    if x.dim() != 2 or x.dtype not in WIDE_DTYPES or not 0 < x.shape[1] <= LONGEST_ROW:
        raise KernelError(
            f"quantize_rows: x is {x.dtype} of shape {tuple(x.shape)}, expected a matrix of "
            f"float32, bfloat16 or float16 with 1 to {LONGEST_ROW} columns"
        )
    quantize = dispatch.implementation(
        "quantize_rows", x, backend, reference=reference.quantize_rows, triton=triton.quantize_rows
    )
    with torch.cuda.device_of(x):  # Triton launches on the current device
        return RowFloat8(*quantize(x, -(-x.shape[0] // multiple) * multiple))


@torch.no_grad()
def rescale_rows_(
    z: torch.Tensor,
    scale_inv: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    applied: float = 1.0,
    backend: str | None = None,
) -> torch.Tensor:
    """z[t] = z[t] * scale_inv[t] / applied + bias, in place; returns `z`.

    It undoes the scaling of rows, and adds a bias. The factor and the product with it are rounded
    to float32, the sum to z's dtype.

    Args:
        z: (T, N) bfloat16, float16 or float32, contiguous.
        scale_inv: (T,) float32.
        bias: (N,) of z's dtype.
        applied: a power of two, with which z was computed already.

    Raises: KernelError for other dtypes, shapes, devices or backends.
    """
    if z.dim() != 2 or z.dtype not in WIDE_DTYPES or not z.is_contiguous():
        raise KernelError(
            f"rescale_rows_: z is {z.dtype} of shape {tuple(z.shape)} and strides {z.stride()}, "
            "expected a contiguous matrix of floats"
        )
    require("rescale_rows_", "scale_inv", scale_inv, torch.float32, (z.shape[0],), z.device)
    require("rescale_rows_", "bias", bias, z.dtype, (z.shape[1],), z.device)
    require_power_of_two("rescale_rows_", "applied", applied)
    rescale = dispatch.implementation(
        "rescale_rows_", z, backend, reference=_by_definition, triton=triton.rescale_rows_
    )
    if z.numel():
        with torch.cuda.device_of(z):
            rescale(z, scale_inv, bias, 1.0 / applied)
    return z


def _by_definition(
    z: torch.Tensor, scale_inv: torch.Tensor, bias: torch.Tensor | None, applied_inv: float
) -> None:
    z.copy_(reference.rescaled_rows(z, scale_inv, bias, applied_inv))
