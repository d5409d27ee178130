"""The definitions of masked decay and of the flip count, in plain torch."""

from __future__ import annotations

import torch


def masked_decay(
    grad: torch.Tensor, w: torch.Tensor, mask: torch.Tensor, decay: float
) -> torch.Tensor:
    """grad + decay * w where `mask` is False, else grad; product and sum each rounded to fp32.

    The sum is then rounded to `grad`'s dtype.
    """
    decayed = grad.float() + w.float() * decay
    return torch.where(mask, grad, decayed.to(grad.dtype))


def count_flips(mask_a: torch.Tensor, mask_b: torch.Tensor) -> torch.Tensor:
    """int64 0-d: the number of entries in which two bool masks differ."""
    return torch.count_nonzero(mask_a ^ mask_b)
