"""The definition of the activations and their gradients in plain torch.

SwiGLU: y = x * s(g) with s(g) = g * sigmoid(g).
GEGLU:  y = x * gelu(g), tanh form, which equals g * sigmoid(2 z) with
        z = sqrt(2 / pi) * (g + 0.044715 g^3), because (1 + tanh z) / 2 = sigmoid(2 z).

So both are y = x * g * sigmoid(h(g)), and with s = sigmoid(h(g)):
        dx = dy * g * s,      dgate = dy * x * (s + g * s * (1 - s) * h'(g)).
GELU, tanh form: that of GEGLU without x.

Arithmetic is float32 (float64 for float64 inputs); results have the dtype of the inputs.
"""

from __future__ import annotations

import math

import torch

from megasparse.kernels.activation.kinds import Activation, is_gated
from megasparse.kernels.factors import NOTHING, Lacking, given

# h(g) = H1 * g + H3 * g^3 of the tanh GELU: twice sqrt(2 / pi) and 0.044715 times that.
GELU_H1 = 2.0 * math.sqrt(2.0 / math.pi)
GELU_H3 = GELU_H1 * 0.044715


def _inner(gate: torch.Tensor, gelu: bool) -> tuple[torch.Tensor, torch.Tensor | float]:
    """h(g) and h'(g)."""
    if not gelu:
        return gate, 1.0
    square = gate * gate
    return gate * (GELU_H1 + GELU_H3 * square), GELU_H1 + 3.0 * GELU_H3 * square


def _wide(t: torch.Tensor) -> torch.Tensor:
    return t if t.dtype == torch.float64 else t.float()


def forward(x: torch.Tensor, gate: torch.Tensor, gelu: bool) -> torch.Tensor:
    """act(gate) * x, in the layout of `x`."""
    g = _wide(gate)
    h, _ = _inner(g, gelu)
    return torch.empty_like(x).copy_(_wide(x) * (g * torch.sigmoid(h)))


def backward(
    dy: torch.Tensor, x: torch.Tensor, gate: torch.Tensor, gelu: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients with respect to `x` and `gate`, each in the layout of its input."""
    dx, dgate = _gradients(dy, x, gate, gelu)
    return torch.empty_like(x).copy_(dx), torch.empty_like(gate).copy_(dgate)


def forward_fused(fused: torch.Tensor, activation: Activation) -> torch.Tensor:
    """The activation of `fused`: [gate | x], or of "gelu" the gate alone."""
    if is_gated(activation):
        gate, x = fused.chunk(2, dim=-1)
        return forward(x, gate, activation == "geglu")
    g = _wide(fused)
    return torch.empty_like(fused).copy_(g * torch.sigmoid(_inner(g, True)[0]))


def backward_fused(
    dy: torch.Tensor,
    fused: torch.Tensor,
    activation: Activation,
    dy_factors: Lacking = NOTHING,
    factors: Lacking = NOTHING,
) -> torch.Tensor:
    """The gradient with respect to `fused`, in its layout; of dy and `fused` times factors."""
    dy, fused = given(dy, dy_factors), given(fused, factors)
    if is_gated(activation):
        gate, x = fused.chunk(2, dim=-1)
        dx, dgate = _gradients(dy, x, gate, activation == "geglu")
        return torch.empty_like(fused).copy_(torch.cat([dgate, dx], -1))
    one = torch.ones((), dtype=fused.dtype, device=fused.device)
    return torch.empty_like(fused).copy_(_gradients(dy, one, fused, True)[1])


def _gradients(
    dy: torch.Tensor, x: torch.Tensor, gate: torch.Tensor, gelu: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    d, g = _wide(dy), _wide(gate)
    h, slope = _inner(g, gelu)
    s = torch.sigmoid(h)
    return d * (g * s), d * _wide(x) * (s + g * s * (1.0 - s) * slope)
