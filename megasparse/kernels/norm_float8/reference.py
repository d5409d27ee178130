"""The definition of `norm_float8`: torch's norm and the quantizer, one after the other."""

from __future__ import annotations

import torch
from torch.nn.functional import layer_norm, rms_norm

from megasparse.kernels.float8 import operands


def norm_float8(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    centred: bool,
    eps: float,
    scale: torch.Tensor,
    transposed: bool,
    strided: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """rows, columns, mean, rstd (of `NormFloat8`), and the largest magnitude of the norm, 0-d."""
    y = normalize(x, weight, bias, eps, centred)
    rows, columns, amax = operands(y, scale, transposed, strided)
    values, mean = x.float(), None
    if centred:
        mean = values.mean(1)
        values = values - mean[:, None]
    rstd = torch.rsqrt(values.square().mean(1) + eps)
    return rows, columns, mean, rstd, amax


def norm_amax(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, centred: bool, eps: float
) -> torch.Tensor:
    """float32 (1,): the largest magnitude of the norm."""
    return normalize(x, weight, bias, eps, centred).float().abs().amax().reshape(1)


def normalize(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, centred: bool
) -> torch.Tensor:
    """The norm in the dtype of x, by torch; differentiable.

    RMSNorm with a bias, which torch does not have, is rounded after the addition alone.
    """
    if centred:
        return layer_norm(x, weight.shape, weight, bias, eps)
    if bias is None:
        return rms_norm(x, weight.shape, weight, eps)
    return (rms_norm(x.float(), weight.shape, weight.float(), eps) + bias.float()).to(x.dtype)
