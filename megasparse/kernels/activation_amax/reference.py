"""The definitions of the largest magnitudes of an activation and of its gradient."""

from __future__ import annotations

import torch

from megasparse.kernels.activation.kinds import Activation
from megasparse.kernels.activation.reference import backward_fused, forward_fused
from megasparse.kernels.factors import Lacking, given


def activation_amax(fused: torch.Tensor, activation: Activation, factors: Lacking) -> torch.Tensor:
    """float32 (1,): of the activation."""
    y = forward_fused(given(fused, factors), activation)
    return y.float().abs().amax().reshape(1)


def activation_grad_amax(
    dy: torch.Tensor,
    fused: torch.Tensor,
    activation: Activation,
    dy_factors: Lacking,
    factors: Lacking,
) -> torch.Tensor:
    """float32 (1,): of the gradient with respect to `fused`."""
    dz = backward_fused(given(dy, dy_factors), given(fused, factors), activation)
    return dz.float().abs().amax().reshape(1)
