"""FP8 GEMMs of experts: e4m3 with delayed or current scaling, dense or with 2:4 operands.

Formats are those of other layers (`dense_fp8.py`, `packed_fp8.py`). Each operand has one scale for
all experts of a layer: scales are powers of two, and e4m3 has 15 of them between its largest and
its smallest normal number, so an expert whose values are some hundred times smaller than another's
loses nothing by it. What is made of x, of dZ and of the weight is made for all experts in one pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from megasparse.fp8.scale import Scale
from megasparse.kernels.float8 import E5M2
from megasparse.kernels.packed24 import E4M3, Packed24
from megasparse.kernels.random import SeedLike
from megasparse.sparsity.gemms.dense_fp8 import ALIGNMENT, OperandQuantizers, kept_scale
from megasparse.sparsity.gemms.expert_products import scaled_products, scaled_sums
from megasparse.sparsity.gemms.expert_tokens import ExpertTokens
from megasparse.sparsity.gemms.experts import StepByStep
from megasparse.sparsity.gemms.protocol import SavedInput, kept_in_place
from megasparse.sparsity.gradient_sum import GradientSum
from megasparse.sparsity.probe import Probe
from megasparse.sparsity.projection import Projected


class Fp8ExpertGradOutput(NamedTuple):
    """dZ as both GEMMs of the backward pass read it.

    Attributes:
        row: (T', N) 8 bit.
        along_tokens: dZ^T, (N, T') dense, or of each expert packed.
        row_scale, along_scale: of the two.
    """

    row: torch.Tensor
    along_tokens: torch.Tensor | Sequence[Packed24]
    tokens: ExpertTokens
    row_scale: Scale
    along_scale: Scale


class DenseFp8ExpertGemms(StepByStep):
    """All three GEMMs dense in FP8: experts that stay dense, or those of a dense phase.

    Args:
        experts: E of this rank.
        quantizers: of the layer's operands.
        hybrid: dZ in e5m2.
        grouped: on a GPU one launch for all experts, where both operands are e4m3.
        probe: is told what is quantized.
    """

    tile, draws = ALIGNMENT, False
    _w_NK: torch.Tensor | None = None
    _w_KN: torch.Tensor | None = None
    _weight: Scale | None = None

    def __init__(
        self,
        experts: int,
        quantizers: OperandQuantizers,
        hybrid: bool = False,
        grouped: bool = False,
        probe: Probe | None = None,
    ) -> None:
        self.ran_sparse: set[str] = set()
        self.total: GradientSum | None = None
        self._experts, self._grouped = experts, grouped
        self._quantizers, self._probe = quantizers, probe or Probe()
        self._row_dtype = E5M2 if hybrid else E4M3

    def refill(self, w_NK: torch.Tensor, projected: Projected | None) -> None:
        row, column, scale = self._quantizers.weight.quantized(w_NK.detach(), columns=True)
        assert row is not None and column is not None
        self._w_NK = kept_in_place(self._w_NK, row)
        self._w_KN = kept_in_place(self._w_KN, column)
        self._weight = kept_scale(self._weight, scale)
        if self._probe.asked:
            self._probe.fp8("weight", w_NK, row)

    def output(self, x_TK: torch.Tensor, tokens: ExpertTokens) -> torch.Tensor:
        row, _, x = self._quantizers.x.quantized(x_TK, record=False)
        assert row is not None
        return self._multiply_output(row, x, tokens)

    def output_and_saved(
        self, x_TK: torch.Tensor, tokens: ExpertTokens
    ) -> tuple[torch.Tensor, SavedInput]:
        row, x_KT, x = self._quantizers.x.quantized(x_TK, columns=True)
        assert row is not None and x_KT is not None
        saved = (x_KT, *self._quantizers.x.saved_with(x))
        return self._multiply_output(row, x, tokens), saved

    def _multiply_output(self, row: torch.Tensor, x: Scale, tokens: ExpertTokens) -> torch.Tensor:
        assert self._w_NK is not None
        w_ENK = self._w_NK.unflatten(0, (self._experts, -1))
        return scaled_products(row, w_ENK, tokens.counts, x, self._weight_now(), self._grouped)

    def prepare_grad_output(
        self, dz_TN: torch.Tensor, tokens: ExpertTokens, seed: SeedLike
    ) -> Fp8ExpertGradOutput:
        row, dz_NT, dz = self._quantizers.gradient.quantized(
            dz_TN, columns=True, dtype=self._row_dtype
        )
        assert row is not None and dz_NT is not None
        if self._probe.asked:
            self._probe.fp8("grad_output", dz_TN, row)
        return Fp8ExpertGradOutput(row, dz_NT, tokens, dz, dz)

    def grad_input(self, operands: Fp8ExpertGradOutput) -> torch.Tensor:
        assert self._w_KN is not None
        w_EKN = self._w_KN.unflatten(1, (self._experts, -1)).transpose(0, 1)
        row, counts, weight = operands.row, operands.tokens.counts, self._weight_now()
        return scaled_products(row, w_EKN, counts, operands.row_scale, weight, self._grouped)

    def grad_weight(self, operands: Fp8ExpertGradOutput, saved: SavedInput) -> torch.Tensor:
        assert isinstance(operands.along_tokens, torch.Tensor)
        x, counts = self._quantizers.x.scale_of_saved(saved[1:]), operands.tokens.counts
        along, scale = operands.along_tokens, operands.along_scale
        return scaled_sums(along, saved[0], counts, scale, x, self._grouped).flatten(0, 1)

    def _weight_now(self) -> Scale:
        """As of other FP8 layers: the weight's scale with what products assume now."""
        assert self._weight is not None
        kept = self._weight
        return self._quantizers.weight.scale_of_saved((kept.scale, kept.scale_inv))
