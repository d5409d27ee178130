"""The activations between two linears that kernels know."""

from __future__ import annotations

from typing import Literal

# Of a projection [gate | x]: silu(gate) * x and gelu(gate) * x; of a plain one: gelu. GELU is
# always in its tanh form.
Activation = Literal["swiglu", "geglu", "gelu"]


def is_gated(activation: Activation) -> bool:
    """Whether its input is twice as wide as its output."""
    return activation != "gelu"
