"""All three GEMMs dense in FP8: dense layers, those of a dense phase, and what packed GEMMs share.

| GEMM        | operands                                    |
|-------------|---------------------------------------------|
| output      | X e4m3, W e4m3                              |
| grad_input  | dZ e4m3 (e5m2 with "hybrid"), W e4m3        |
| grad_weight | dZ^T e4m3 (e5m2 with "hybrid"), X^T e4m3    |

Each tensor is read once: x gives its row-major and its transposed copy, and so do the weight and
dZ. Transformer Engine quantizes, cuBLAS multiplies, as in its own linears. Results are bfloat16.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad

from megasparse.fp8.scale import Largest, Quantizer, Scale
from megasparse.fp8.transformer_engine import transposed
from megasparse.kernels import (
    Activation,
    activation_amax,
    activation_backward,
    activation_float8,
    transpose_float8,
)
from megasparse.kernels.factors import Factors
from megasparse.kernels.float8 import E5M2
from megasparse.kernels.packed24 import E4M3, Packed24
from megasparse.kernels.random import SeedLike
from megasparse.sparsity.gemms.fp8_products import scaled_mm
from megasparse.sparsity.gemms.protocol import Deferred, SavedInput, kept_in_place, sum_over_tokens
from megasparse.sparsity.gradient_sum import GradientSum
from megasparse.sparsity.probe import Probe
from megasparse.sparsity.projection import Projected

ALIGNMENT = 128  # rows and columns of a packed 8-bit operand, and tokens


class OperandQuantizers(NamedTuple):
    """The quantizers of one layer's operands."""

    x: Quantizer
    weight: Quantizer
    gradient: Quantizer
    draw: Quantizer

    @classmethod
    def of(
        cls, scaling: Any, split: int | None = None, of_experts: bool = False
    ) -> OperandQuantizers:
        """Four new ones of a DelayedScaling or CurrentScaling.

        Args:
            split: the dimension of the weight (N, K) that tensor parallelism splits: 0 splits dZ
                too, 1 splits x.
            of_experts: the weight is of experts, which expert parallelism divides.
        """
        x, weight, gradient, draw = (split == 1, split is not None, split == 0, split == 0)
        return cls(
            scaling.quantizer(x),
            scaling.quantizer(weight, of_experts),
            scaling.quantizer(gradient),
            scaling.quantizer(draw),
        )

    def export_state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps of them."""
        return self.x.scaling.export_state(tuple(self))

    def import_state(self, state: dict[str, torch.Tensor]) -> None:
        """Take over what `export_state` gave."""
        self.x.scaling.import_state(tuple(self), state)


class Fp8GradOutput(NamedTuple):
    """dZ as both GEMMs of the backward pass read it.

    Attributes:
        row: (T', N) 8 bit, T' a multiple of 128.
        along_tokens: dZ^T (N, T'), packed or dense.
        tokens: T.
        row_scale, along_scale: of the two.
    """

    row: torch.Tensor
    along_tokens: Packed24 | torch.Tensor
    tokens: int
    row_scale: Scale
    along_scale: Scale


class DenseFp8Gemms:
    """The GEMMs of a dense layer, or of a dense phase.

    Args:
        quantizers: of the layer.
        hybrid: dZ in e5m2.
        probe: is told what is quantized.
    """

    total: GradientSum | None = None
    _weight: Scale
    _w_NK: torch.Tensor | None = None
    _w_KN: torch.Tensor | None = None

    def __init__(
        self, quantizers: OperandQuantizers, hybrid: bool = False, probe: Probe | None = None
    ) -> None:
        self.ran_sparse: set[str] = set()
        self.strided = False
        self._quantizers, self._probe = quantizers, probe or Probe()
        self._row_dtype = E5M2 if hybrid else E4M3

    def refill(self, w_NK: torch.Tensor, projected: Projected | None) -> None:
        row, column, scale = self._quantizers.weight.quantized(w_NK.detach(), columns=True)
        assert row is not None and column is not None
        self._w_NK = kept_in_place(self._w_NK, row)
        self._w_KN = kept_in_place(self._w_KN, column)
        self._weight = self._scale_in_place(scale)
        if self._probe.asked:
            self._probe.fp8("weight", w_NK, row)

    def _scale_in_place(self, scale: Scale) -> Scale:
        """The weight's scale at an address that stays: current scaling makes new tensors."""
        return kept_scale(getattr(self, "_weight", None), scale)

    def _weight_now(self) -> Scale:
        """The weight's scale with what products assume now. A captured `refill` fills its place
        without this object's knowledge, and scales are assumed anew without a refill."""
        kept = self._weight
        return self._quantizers.weight.scale_of_saved((kept.scale, kept.scale_inv))

    def input_scale(self, largest: Largest) -> Scale | None:
        return self._quantizers.x.scale_by(largest)

    def output(self, x_TK: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return self.output_and_saved(x_TK, bias, save=False)[0]

    def output_and_saved(
        self,
        x_TK: torch.Tensor,
        bias: torch.Tensor | None = None,
        save: bool = True,
        deferred: Deferred | None = None,
    ) -> tuple[torch.Tensor, SavedInput]:
        row, x_KT, x = self._quantized_input(x_TK, columns=save, record=save)
        assert row is not None
        z_TN = self._multiply_output(row, x, bias, deferred=deferred)
        return z_TN[: x_TK.shape[0]], self._saved(x_KT, x)

    def output_of_quantized(
        self,
        row: torch.Tensor,
        x_KT: torch.Tensor | None,
        tokens: int,
        x: Scale,
        bias: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        deferred: Deferred | None = None,
    ) -> tuple[torch.Tensor, SavedInput]:
        z_TN = self._multiply_output(row, x, bias, out, deferred)
        return z_TN[:tokens], self._saved(x_KT, x)

    def output_of_activated(
        self,
        projected_TF: torch.Tensor,
        activation: Activation,
        save: bool,
        bias: torch.Tensor | None = None,
        factors: Factors | None = None,
    ) -> tuple[torch.Tensor, SavedInput]:
        x = self._quantizers.x.scale_by(
            lambda: activation_amax(projected_TF, activation, factors=factors)
        )
        row, x_KT = activation_float8(
            projected_TF,
            scale=x.scale,
            activation=activation,
            transposed=save,
            strided=self.strided,
            amax=x.amax if save else None,
            factors=factors,
        )
        z_TN = self._multiply_output(row, x, bias)
        return z_TN[: projected_TF.shape[0]], self._saved(x_KT, x)

    def save_input(self, x_TK: torch.Tensor) -> SavedInput:
        _, x_KT, x = self._quantized_input(x_TK, columns=True)
        return self._saved(x_KT, x)

    def save_quantized(self, row: torch.Tensor) -> SavedInput:
        x = self._quantizers.x.known_scale()
        assert x is not None
        return self._saved(transpose_float8(row) if self.strided else transposed(row), x)

    def _quantized_input(
        self, x_TK: torch.Tensor, columns: bool, record: bool = True
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, Scale]:
        """x in whole tiles of tokens, row-major and, with `columns`, transposed for grad_weight."""
        direct = columns and not self.strided
        row, x_KT, x = self._quantizers.x.quantized(
            whole_tiles(x_TK), columns=direct, record=record
        )
        if columns and self.strided:
            assert row is not None
            x_KT = transpose_float8(row)
        return row, x_KT, x

    def _saved(self, x_KT: torch.Tensor | None, x: Scale) -> SavedInput:
        return () if x_KT is None else (x_KT, *self._quantizers.x.saved_with(x))

    def _multiply_output(
        self,
        row: torch.Tensor,
        x: Scale,
        bias: torch.Tensor | None,
        out: torch.Tensor | None = None,
        deferred: Deferred | None = None,
    ) -> torch.Tensor:
        assert self._w_NK is not None
        return scaled_mm(row, self._w_NK, x, self._weight_now(), bias, out)

    def prepare_grad_output(
        self, dz_TN: torch.Tensor, seed: SeedLike, sums: torch.Tensor | None = None
    ) -> Fp8GradOutput:
        sum_over_tokens(dz_TN, sums)
        row, dz_NT, dz = self._quantizers.gradient.quantized(
            whole_tiles(dz_TN), columns=True, dtype=self._row_dtype
        )
        assert row is not None and dz_NT is not None
        if self._probe.asked:
            self._probe.fp8("grad_output", dz_TN, row)
        return Fp8GradOutput(row, dz_NT, dz_TN.shape[0], dz, dz)

    def prepare_activated_grad_output(
        self,
        dy_TF: torch.Tensor,
        projected_TF: torch.Tensor,
        activation: Activation,
        seed: SeedLike,
        sums: torch.Tensor | None = None,
        factors: tuple[Factors | None, Factors | None] = (None, None),
    ) -> Fp8GradOutput:
        of_dy, rest = factors
        dz_TN = activation_backward(dy_TF, projected_TF, activation, dy_factors=of_dy, factors=rest)
        return self.prepare_grad_output(dz_TN, seed, sums)

    def grad_input(self, operands: Fp8GradOutput, deferred: Deferred | None = None) -> torch.Tensor:
        assert self._w_KN is not None
        product = scaled_mm(operands.row, self._w_KN, operands.row_scale, self._weight_now())
        return product[: operands.tokens]

    def grad_weight(self, operands: Fp8GradOutput, saved: SavedInput) -> torch.Tensor:
        assert isinstance(operands.along_tokens, torch.Tensor)
        x = self._quantizers.x.scale_of_saved(saved[1:])
        return scaled_mm(operands.along_tokens, saved[0], operands.along_scale, x)

    def grad_weight_to_scale(
        self, operands: Fp8GradOutput, saved: SavedInput
    ) -> tuple[torch.Tensor, Factors | None]:
        return self.grad_weight(operands, saved), None


def kept_scale(before: Scale | None, scale: Scale) -> Scale:
    """`scale` at the addresses of an earlier step's; the first keeps its own."""
    if before is None or before.scale is scale.scale:
        return scale
    return scale._replace(
        scale=before.scale.copy_(scale.scale), scale_inv=before.scale_inv.copy_(scale.scale_inv)
    )


def whole_tiles(x_TK: torch.Tensor) -> torch.Tensor:
    """Tokens of zeros up to a multiple of 128: they add nothing."""
    missing = -x_TK.shape[0] % ALIGNMENT
    return pad(x_TK, (0, 0, 0, missing)) if missing else x_TK
