"""A norm that leaves as the operands of an 8-bit GEMM, in one pass over its input."""

from __future__ import annotations

from typing import NamedTuple

import torch

from megasparse.errors import KernelError
from megasparse.kernels import dispatch
from megasparse.kernels.checks import require
from megasparse.kernels.float8 import check_scaling, raise_amax
from megasparse.kernels.norm_float8 import reference, triton

DTYPES = (torch.bfloat16, torch.float16)
WIDTH_MULTIPLE = 64


class NormFloat8(NamedTuple):
    """What `norm_float8` gives.

    Attributes:
        rows: (T', H) e4m3, T' is T up to a multiple of 128, with zeros.
        columns: (H, T') e4m3, the transpose, or None.
        mean: (T,) float32, of each token's channels; None for RMSNorm.
        rstd: (T,) float32, 1 / sqrt(variance + eps); for RMSNorm of the mean square.
    """

    rows: torch.Tensor
    columns: torch.Tensor | None
    mean: torch.Tensor | None
    rstd: torch.Tensor


@torch.no_grad()
def norm_float8(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    centred: bool,
    eps: float,
    scale: torch.Tensor,
    transposed: bool = True,
    strided: bool = False,
    amax: torch.Tensor | None = None,
    backend: str | None = None,
) -> NormFloat8:
    """LayerNorm or RMSNorm of x, quantized to e4m3, row-major and transposed.

        y = (x - mean) * rstd * weight + bias          float32, mean 0 for RMSNorm

    rounded to the dtype of x, times `scale`, saturated: what a norm followed by a quantizer gives,
    but the 16-bit y is never written. Statistics are float32 sums, whose order is each
    implementation's own: now and then a last bit of y, and so a byte of the result, is another.

    Args:
        x: (T, H), bfloat16 or float16, read row-major (copied otherwise); any T, H a multiple of
            64.
        weight, bias: (H,), of the same dtype; no bias: 0.
        centred: LayerNorm; else RMSNorm.
        eps: added to the variance.
        scale: 0-d float32 on the device of x, the multiplier; to nearest even, saturated
            (infinities too); NaN stays NaN.
        transposed: whether the transposed copy is wanted.
        strided: its tokens in the order of strided groups (`token_order.by_groups`).
        amax: float32 (1,) there, raised to the largest |y|; a NaN makes it NaN.
        backend: None, "reference" or "triton".

    Returns: operands and statistics, outside autograd.

    Raises: KernelError on sizes, dtypes, or a backend that cannot run.
    """
    _check("norm_float8", x, weight, bias)
    check_scaling("norm_float8", x.device, scale, amax)
    run = dispatch.implementation(
        "norm_float8", x, backend, reference=_by_definition, triton=triton.norm_float8
    )
    return NormFloat8(*run(x, weight, bias, centred, eps, scale, transposed, strided, amax))


@torch.no_grad()
def norm_amax(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    centred: bool,
    eps: float,
    backend: str | None = None,
) -> torch.Tensor:
    """float32 (1,): the largest magnitude of the same norm, rounded to 16 bits; NaN for a NaN.

    Arguments and errors are those of `norm_float8`. Nothing waits for the device. The order of the
    sums is not that of `norm_float8`: the last bit may differ.
    """
    _check("norm_amax", x, weight, bias)
    run = dispatch.implementation(
        "norm_amax", x, backend, reference=reference.norm_amax, triton=triton.norm_amax
    )
    return run(x, weight, bias, centred, eps)


def _check(op: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    if x.dim() != 2 or x.dtype not in DTYPES or not x.shape[0] or x.shape[1] % WIDTH_MULTIPLE:
        raise KernelError(
            f"{op}: x is {x.dtype} of shape {tuple(x.shape)}, expected 16 bits, (T, H), "
            f"H a multiple of {WIDTH_MULTIPLE}"
        )
    for name, tensor in (("weight", weight), ("bias", bias)):
        require(op, name, tensor, x.dtype, (x.shape[1],), x.device)


def _by_definition(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    centred: bool,
    eps: float,
    scale: torch.Tensor,
    transposed: bool,
    strided: bool,
    amax: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
    rows, columns, mean, rstd, found = reference.norm_float8(
        x, weight, bias, centred, eps, scale, transposed, strided
    )
    raise_amax(amax, found)
    return rows, columns, mean, rstd
