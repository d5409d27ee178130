"""The definition of a sum over micro-batches, in plain torch."""

from __future__ import annotations

import torch


def accumulated(total: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`total + value` in float32, rounded to total's dtype."""
    return (total.float() + value.float()).to(total.dtype)
