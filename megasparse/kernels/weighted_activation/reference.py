"""The definition of the weighted activation and its gradients, one operation after the other."""

from __future__ import annotations

import torch

from megasparse.kernels.activation.kinds import Activation
from megasparse.kernels.activation.reference import backward_fused, forward_fused


def weighted_activation(
    fused: torch.Tensor, weights: torch.Tensor, activation: Activation
) -> torch.Tensor:
    """(T, F)."""
    return (forward_fused(fused, activation) * weights[:, None]).to(fused.dtype)


def weighted_activation_backward(
    dy: torch.Tensor, fused: torch.Tensor, weights: torch.Tensor, activation: Activation
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the projection and of the weights."""
    wide = dy.to(torch.promote_types(torch.promote_types(dy.dtype, weights.dtype), torch.float32))
    dweights = (wide * forward_fused(fused, activation)).sum(1).to(weights.dtype)
    dy = (wide * weights[:, None]).to(fused.dtype)
    return backward_fused(dy, fused, activation), dweights
