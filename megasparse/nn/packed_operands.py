"""Weights packed for sparse tensor cores, in 16 bits or FP8, and their products in inference."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Protocol

import torch
from torch.nn.functional import linear as dense_linear

from megasparse.fp8.scale import Scale
from megasparse.kernels import (
    RowFloat8,
    pack24,
    quantize_rows,
    rescale_rows_,
    scales_of_amax,
    spmm24,
)
from megasparse.kernels.packed24 import E4M3, Packed24
from megasparse.sparsity.gemms.fp8_products import scaled_mm

# Rows in e4m3 reach 448; with this factor products of them stay within float16.
_UNIT = 2.0**-9


class Operands(Protocol):
    """A weight W (N, K) in the packed layout."""

    packed: Packed24

    def whole(self, x: torch.Tensor, bias: torch.Tensor | None, algorithm: int) -> torch.Tensor:
        """`x W^T + bias` `(T, N)` of an x `(..., K)`, with all that x needs before."""
        ...

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> Callable[[int], torch.Tensor]:
        """The product alone by an algorithm of the library, of an x that is ready."""
        ...

    def expected(
        self, x: torch.Tensor, w_NK: torch.Tensor, bias: torch.Tensor | None
    ) -> Callable[[], torch.Tensor]:
        """A function that gives what `product` does by a dense GEMM, on the same operands."""
        ...

    def forget(self) -> None:
        """Nothing of an x is used again."""
        ...


class SixteenBit:
    """W packed in its own precision."""

    def __init__(self, w_NK: torch.Tensor) -> None:
        self.packed = pack24(w_NK)

    def whole(self, x: torch.Tensor, bias: torch.Tensor | None, algorithm: int) -> torch.Tensor:
        """See Operands."""
        return spmm24(self.packed, x.reshape(-1, x.shape[-1]), algorithm=algorithm, bias=bias)

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> Callable[[int], torch.Tensor]:
        """See Operands."""
        return lambda algorithm: self.whole(x, bias, algorithm)

    def expected(
        self, x: torch.Tensor, w_NK: torch.Tensor, bias: torch.Tensor | None
    ) -> Callable[[], torch.Tensor]:
        """See Operands."""
        return lambda: dense_linear(x.reshape(-1, x.shape[-1]), w_NK, bias)

    def forget(self) -> None:
        """An x is used as it is."""


class LastInput:
    """The last x in e4m3: linears that share an x, one after the other, cast it once.

    What writes to an x between two of them has to count its version up, as all of torch does.
    """

    def __init__(self) -> None:
        self._of: weakref.ref[torch.Tensor] | None = None
        self._version = -1
        self._rows: RowFloat8 | None = None

    def quantized(self, x: torch.Tensor) -> RowFloat8:
        """x (..., K) in e4m3, row by row."""
        # Tensors of inference mode have no versions.
        version = -1 if x.is_inference() else x._version
        known = self._of is not None and self._of() is x and self._version == version >= 0
        if not known or self._rows is None:
            self._rows = quantize_rows(x.reshape(-1, x.shape[-1]))
            self._of, self._version = weakref.ref(x), version
        return self._rows

    def forget(self) -> None:
        """Cast the next x, whatever it is."""
        self._of = self._rows = None


class EightBit:
    """W packed in e4m3 with one scale; each row of x is scaled by its own largest magnitude.

    Args:
        last: shared by the linears of a model.
    """

    def __init__(self, w_NK: torch.Tensor, last: LastInput) -> None:
        scales = scales_of_amax(w_NK.abs().amax().float().reshape(1), power_of_two=True)
        self._weight = Scale(scales.scale, scales.scale_inv)
        self._alpha = float(scales.scale_inv) * _UNIT
        self._last = last
        self.packed = pack24(w_NK, E4M3, scales.scale_inv)

    def whole(self, x: torch.Tensor, bias: torch.Tensor | None, algorithm: int) -> torch.Tensor:
        """See Operands."""
        rows, scale_inv = self._last.quantized(x)
        z = self._multiply(rows, x.dtype, algorithm)[: scale_inv.shape[0]]
        return rescale_rows_(z, scale_inv, bias, applied=_UNIT)

    def _multiply(self, rows: torch.Tensor, dtype: torch.dtype, algorithm: int) -> torch.Tensor:
        return spmm24(self.packed, rows, out_dtype=dtype, algorithm=algorithm, alpha=self._alpha)

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> Callable[[int], torch.Tensor]:
        """See Operands."""
        rows = self._last.quantized(x).rows
        return lambda algorithm: self._multiply(rows, x.dtype, algorithm)

    def expected(
        self, x: torch.Tensor, w_NK: torch.Tensor, bias: torch.Tensor | None
    ) -> Callable[[], torch.Tensor]:
        """See Operands."""
        rows, stored = self._last.quantized(x).rows, self.packed.stored()
        unit = torch.full((), _UNIT, dtype=torch.float32, device=x.device)
        return lambda: scaled_mm(rows, stored, Scale(unit.reciprocal(), unit), self._weight)

    def forget(self) -> None:
        """See Operands."""
        self._last.forget()
