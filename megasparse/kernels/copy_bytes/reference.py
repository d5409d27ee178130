"""The definition of a copy, in plain torch."""

from __future__ import annotations

import torch


def copied(source: torch.Tensor) -> torch.Tensor:
    """The same values, elsewhere."""
    return source.clone()
