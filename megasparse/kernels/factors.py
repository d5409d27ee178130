"""Factors that a product of scaled operands still lacks, for the kernel that reads it.

A factor is `a * b / applied`: what undoes the scaling of both operands, which the device knows, and
what the product was multiplied by when it was computed.
"""

from __future__ import annotations

import torch

from megasparse.kernels.checks import require, require_power_of_two

# Two factors on the device, float32 with one entry, and one that the value has been given already.
Factors = tuple[torch.Tensor, torch.Tensor, float]
# The same as kernels take it: the last is 1 / applied, and where nothing is lacking there is none.
Lacking = tuple[torch.Tensor | None, torch.Tensor | None, float]
NOTHING: Lacking = (None, None, 1.0)


def lacking(op: str, factors: Factors | None, device: torch.device) -> Lacking:
    """What a kernel multiplies by, checked.

    Raises: KernelError for other dtypes, shapes or devices, or where applied is no power of two.
    """
    if factors is None:
        return NOTHING
    a, b, applied = factors
    require(op, "a", a, torch.float32, (), device)
    require(op, "b", b, torch.float32, (), device)
    require_power_of_two(op, "applied", applied)
    return a, b, 1.0 / applied


def given(z: torch.Tensor, factors: Lacking) -> torch.Tensor:
    """The definition: z times its factor in float32, rounded to z's dtype; z if it lacks none."""
    a, b, applied_inv = factors
    if a is None or b is None:
        return z
    return (z.float() * (a * applied_inv * b)).to(z.dtype)
