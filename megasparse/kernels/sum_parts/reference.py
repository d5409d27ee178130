"""The definition of a sum of parts, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def sum_parts(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Their sum in float32, in their order, rounded once to their dtype."""
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total.to(parts[0].dtype)
