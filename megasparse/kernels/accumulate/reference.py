"""The definition of a sum over micro-batches, in plain torch."""

from __future__ import annotations

import torch


def accumulated(
    total: torch.Tensor,
    value: torch.Tensor,
    factor: torch.Tensor | None = None,
    begins: torch.Tensor | None = None,
) -> torch.Tensor:
    """`total + factor value` in float32, rounded to total's dtype; where a sum begins, without
    total.

    Args:
        factor: float32, 0-d; None: 1.
        begins: not 0 where the sum begins, whatever total holds; None: it does not.
    """
    part = value.float() if factor is None else value.float() * factor
    before = total.float()
    if begins is not None:
        before = torch.where(begins.reshape(()) != 0, 0.0, before)
    return (before + part).to(total.dtype)
