"""The definition of `norm_float8`: torch's norm and the quantiser, one after the other."""

from __future__ import annotations

import torch
from torch.nn.functional import layer_norm, rms_norm

from megasparse.kernels.float8 import fill_operands


def norm_float8(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    scale: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor | None,
    mean: torch.Tensor | None,
    rstd: torch.Tensor,
    amax: torch.Tensor | None,
) -> None:
    """Fill `rows`, `columns`, `mean` (None: RMSNorm) and `rstd`; raise `amax`."""
    fill_operands(normalise(x, weight, bias, eps, mean is not None), scale, rows, columns, amax)
    values = x.float()
    if mean is not None:
        mean.copy_(values.mean(1))
        values = values - mean[:, None]
    rstd.copy_(torch.rsqrt(values.square().mean(1) + eps))


def normalise(
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
