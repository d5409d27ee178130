"""The definitions of figures of whole tensors, in plain torch."""

from __future__ import annotations

import torch


def tensor_figures(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """0-d: non-zeros, sums of magnitudes and of squares (float64); the largest (float32)."""
    magnitude = torch.linalg.vector_norm(x, 1, dtype=torch.float32).double()
    return torch.count_nonzero(x).double(), magnitude, square(x), _largest(x)


def square(x: torch.Tensor) -> torch.Tensor:
    """float64 0-d: the sum of squares; of 8 bits too."""
    wide = x.float() if x.itemsize == 1 else x
    return torch.linalg.vector_norm(wide, dtype=torch.float32).double().square()


def rounding_figures(values: torch.Tensor, rounded: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """float64 (3,): entries at the format's limit, entries lost, all; float32 0-d: the largest."""
    stored = rounded.float()
    at_limit = torch.count_nonzero(stored.abs() >= torch.finfo(rounded.dtype).max)
    lost = torch.count_nonzero(values) - torch.count_nonzero(stored)
    entries = torch.full_like(lost, values.numel())
    return torch.stack([at_limit, lost, entries]).double(), _largest(values)


def _largest(x: torch.Tensor) -> torch.Tensor:
    return x.abs().amax().float()
