"""How an operand was scaled, and what a quantizer of one operand can do.

Scales are powers of two, so that undoing them is exact: a product may be rounded to bfloat16 before
the factor is applied or after, with the same bits. The sparse GEMM library takes its factor from
the host, where scales are known late (a captured step never asks for them). So every operand has
an `assumed` inverse scale on the host, which the library applies, and a scale on the device; where
the two differ, one more pass over the product corrects it (`sparsity/gemms/fp8_products.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch

from megasparse.kernels.float8 import quantize as definition
from megasparse.kernels.packed24 import E4M3

# Largest (or sum) over the ranks that share a tensor, in place.
Reduce = Callable[[torch.Tensor], torch.Tensor]

# The largest magnitude of a tensor, float32 (1,).
Largest = Callable[[], torch.Tensor]

# Beyond these the product of two assumed factors could leave float32's range.
_LARGEST_ASSUMED = 2.0**60


class Scale(NamedTuple):
    """The scaling of one quantized tensor: q = cast(x * scale), x = q * scale_inv.

    Attributes:
        scale, scale_inv: float32 0-d on the device, powers of two.
        assumed: the inverse scale that products take from the host.
        exact: whether the host knows that `assumed` is `scale_inv`.
        amax: float32 (1,), which kernels raise to the largest magnitude; None: nowhere.
        draw: the scale of MVUE draws from the tensor, where it follows from the same amax.
    """

    scale: torch.Tensor
    scale_inv: torch.Tensor
    assumed: float = 1.0
    exact: bool = False
    amax: torch.Tensor | None = None
    draw: tuple[torch.Tensor, torch.Tensor] | None = None


class Quantizer(Protocol):
    """Scaling and quantizing of one operand of one layer, to e4m3 or (gradients) e5m2.

    Attributes:
        scaling: the DelayedScaling or CurrentScaling that it is of.
        scale_comes_first: whether scales are known before their tensors, from the second use on.
    """

    scaling: Any
    scale_comes_first: bool

    def known_scale(self) -> Scale | None:
        """The scale of the next tensor if it is known before the tensor is; the kernel that
        computes the tensor can quantize it then."""
        ...

    def scale_for(
        self,
        x: torch.Tensor,
        headroom: float | torch.Tensor = 1.0,
        dtype: torch.dtype = E4M3,
    ) -> Scale:
        """The scale of x.

        Args:
            headroom: how much larger than x the values to be quantized may be.
            dtype: of the copy.
        """
        ...

    def scale_by(
        self,
        largest: Largest,
        headroom: float | torch.Tensor = 1.0,
        dtype: torch.dtype = E4M3,
    ) -> Scale:
        """The scale of a tensor that its kernel quantizes as it computes it.

        Args:
            largest: computes its magnitude, where that is needed.
            headroom, dtype: of `scale_for`.
        """
        ...

    def scale_for_draws(self, largest: Largest, headroom: float, scale: Scale) -> Scale:
        """The scale of MVUE draws from a tensor, whose own `scale` is known."""
        ...

    def quantized(
        self,
        x: torch.Tensor,
        *,
        rows: bool = True,
        columns: bool = False,
        record: bool = True,
        dtype: torch.dtype = E4M3,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, Scale]:
        """x (T, K) in 8 bits, row-major (T, K) and transposed (K, T), and its scale.

        Args:
            rows, columns: which of the two are wanted; the others are None.
            record: let the magnitudes count for later scales.
            dtype: of the copies.
        """
        ...

    def saved_with(self, scale: Scale) -> tuple[torch.Tensor, ...]:
        """What has to be saved beside an operand until its last GEMM."""
        ...

    def scale_of_saved(self, saved: tuple[torch.Tensor, ...]) -> Scale:
        """The scale of an operand that was saved with `saved`."""
        ...


def power_of_two_(scale: torch.Tensor) -> torch.Tensor:
    """The largest powers of two that are not above positive float32 scales, in place.

    The exponent bits alone stay; 2^126 is the largest, whose reciprocal is a normal number.
    """
    bits = scale.view(torch.int32)
    bits.bitwise_and_(0x7F800000)
    return scale.clamp_(min=2.0**-126, max=2.0**126)


def assumed_inverse(scale_inv: float) -> float:
    """What products may assume of an inverse scale; 1 where it is out of a sane range."""
    sane = math.isfinite(scale_inv) and 1 / _LARGEST_ASSUMED <= scale_inv <= _LARGEST_ASSUMED
    return scale_inv if sane else 1.0


def quantize_by_definition(
    x: torch.Tensor, scale: torch.Tensor, rows: bool, columns: bool, dtype: torch.dtype = E4M3
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """x (T, K) in 8 bits in plain torch, on any device."""
    whole = definition(x.detach(), scale, dtype)
    return whole if rows else None, whole.t().contiguous() if columns else None
