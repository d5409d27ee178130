"""What a step's projection of a weight came to: the one value that operands are made from."""

from __future__ import annotations

from typing import NamedTuple

import torch

from megasparse.kernels import prune24_mask, soft_threshold24


class Projected(NamedTuple):
    """How the effective weight W~ follows from the master weight W in one step.

    Attributes:
        mask: bool (N, K), what is kept: W~ = W o M.
        beta: 0-d float32, where there is no mask: W~ = beta * S(W), S-STE's soft threshold; of
            stacked weights of experts (E,), one each.
        nan_flag: int32 (1,), raised on the device when W holds a NaN; None: the kernels raise.
        error_flag: int32 (1,), raised on the device when an operand to be packed is not 2:4.
    """

    mask: torch.Tensor | None
    beta: torch.Tensor | None = None
    nan_flag: torch.Tensor | None = None
    error_flag: torch.Tensor | None = None


def effective(w_NK: torch.Tensor, projected: Projected) -> torch.Tensor:
    """W~ (N, K) in the dtype of W: `W o M`, or `beta * S(W)` (S-STE, section 2.2)."""
    if projected.mask is None:
        assert projected.beta is not None
        threshold = soft_threshold24(w_NK, nan_flag=projected.nan_flag)
        beta = projected.beta
        if beta.dim():
            beta = beta.repeat_interleave(w_NK.shape[0] // len(beta)).unsqueeze(1)
        return (threshold.float() * beta).to(w_NK.dtype)
    zero = torch.zeros((), dtype=w_NK.dtype, device=w_NK.device)
    return torch.where(projected.mask, w_NK, zero)


def double_pruned(effective_NK: torch.Tensor, nan_flag: torch.Tensor | None = None) -> torch.Tensor:
    """W~_d (N, K) = W~ o C, in the dtype of W~, where C keeps the two largest magnitudes of each
    four along N, of equals the later row: 2:4 along N, what a sparse grad_input multiplies.

    Args:
        nan_flag: int32 (1,), raised on the device when W~ holds a NaN; None: NumericsError.
    """
    kept = prune24_mask(effective_NK.t(), nan_flag=nan_flag).t()
    zero = torch.zeros((), dtype=effective_NK.dtype, device=effective_NK.device)
    return torch.where(kept, effective_NK, zero)
