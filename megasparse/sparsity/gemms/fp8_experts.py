"""FP8 GEMMs of experts: e4m3 with delayed or current scaling, dense or with 2:4 operands.

Formats are those of other layers (`dense_fp8.py`, `packed_fp8.py`). Each operand has one scale for
all experts of a layer: scales are powers of two, and e4m3 has 15 of them between its largest and
its smallest normal number, so an expert whose values are some hundred times smaller than another's
loses nothing by it. What is made of x, of dZ and of the weight is made for all experts in one pass.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from megasparse.fp8.current import amax_of
from megasparse.fp8.scale import Scale
from megasparse.kernels import effective_weight, grad_pack24_experts, weight_pack24_experts
from megasparse.kernels.float8 import E5M2
from megasparse.kernels.packed24 import E4M3, Packed24, PackedStack
from megasparse.kernels.random import SeedLike
from megasparse.kernels.weight_pack24.experts import ExpertOperands
from megasparse.sparsity.gemms.choice import GemmChooser, shared_chooser
from megasparse.sparsity.gemms.dense_fp8 import ALIGNMENT, OperandQuantizers, kept_scale
from megasparse.sparsity.gemms.expert_products import (
    ExpertChoices,
    Streams,
    each_product,
    each_sum,
    scaled_products,
    scaled_sums,
)
from megasparse.sparsity.gemms.expert_tokens import ExpertTokens
from megasparse.sparsity.gemms.experts import neighbours
from megasparse.sparsity.gemms.fp8_products import undone
from megasparse.sparsity.gemms.packed_fp8 import MVUE_HEADROOM
from megasparse.sparsity.gemms.protocol import SavedInput, kept_in_place
from megasparse.sparsity.gradient_sum import GradientSum
from megasparse.sparsity.probe import Probe
from megasparse.sparsity.projection import Projected
from megasparse.sparsity.recipe import SparsityRecipe
from megasparse.sparsity.shard import ShardSlice


class Fp8ExpertGradOutput(NamedTuple):
    """dZ as both GEMMs of the backward pass read it.

    Attributes:
        row: (T', N) 8 bit.
        along_tokens: dZ^T, (N, T') dense, or of each expert packed.
        row_scale, along_scale: of the two.
    """

    row: torch.Tensor
    along_tokens: torch.Tensor | tuple[Packed24, ...]
    tokens: ExpertTokens
    row_scale: Scale
    along_scale: Scale


class DenseFp8ExpertGemms:
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
            self._tell("weight", w_NK, row)

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
            self._tell("grad_output", dz_TN, row)
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

    def _tell(self, operand: str, values: torch.Tensor, stored: torch.Tensor) -> None:
        self._probe.fp8(operand, values, stored.float(), stored.dtype)


class PackedFp8ExpertGemms(DenseFp8ExpertGemms):
    """The GEMMs of a sparse phase with the experts' W~ packed in e4m3.

    Args:
        experts: E of this rank.
        recipe: what of W~^T is 2:4, and how dZ^T is pruned along tokens.
        channels: where an expert's local outputs lie among its own.
        quantizers: of the layer.
        hybrid: dZ in e5m2 where its GEMM is dense.
        grouped, probe: as above.
        chooser: which GEMMs compute which shape; default: the GPU's own.
    """

    def __init__(
        self,
        experts: int,
        recipe: SparsityRecipe,
        channels: tuple[ShardSlice, ...],
        quantizers: OperandQuantizers,
        hybrid: bool = False,
        grouped: bool = True,
        probe: Probe | None = None,
        chooser: GemmChooser | None = None,
    ) -> None:
        super().__init__(
            experts, quantizers, hybrid and recipe.packed_transpose is None, grouped, probe
        )
        self._recipe, self._chooser = neighbours(recipe), chooser
        self.draws = recipe.mvue != "off"
        self._channels = tuple((s.local_start, s.global_start, s.length) for s in channels)
        self._choices = ExpertChoices(experts, "e4m3")
        self._unpacked: dict[str, torch.Tensor] = {}  # where a dense GEMM is faster
        self._error_flag: torch.Tensor | None = None
        self._operands: ExpertOperands | None = None

    def refill(self, w_NK: torch.Tensor, projected: Projected | None) -> None:
        assert projected is not None
        if self._chooser is None and w_NK.is_cuda:
            self._chooser = shared_chooser(w_NK.device)
        self._error_flag = projected.error_flag
        self._weight = kept_scale(self._weight, self._scale_of(w_NK, projected))
        self._operands = weight_pack24_experts(
            w_NK,
            self._experts,
            projected.mask,
            threshold_scale=projected.beta,
            dtype=E4M3,
            scale=self._weight.scale,
            transposed=self._recipe.packed_transpose or "dense",
            amax=self._weight.amax,
            error_flag=projected.error_flag,
            nan_flag=projected.nan_flag,
            out=self._operands,
        )
        for name, dense in self._unpacked.items():
            dense.copy_(_stored(self._packed_of(name)))
        if self._probe.asked:
            pruned = effective_weight(w_NK, projected.mask, projected.beta)
            packed = self._packed_of("output")
            self._tell("weight", pruned, torch.stack([one.values for one in packed.each]))

    def _scale_of(self, w_NK: torch.Tensor, projected: Projected) -> Scale:
        """Of all entries, kept or not: a bound, and nearly always the largest is kept."""
        quantizer = self._quantizers.weight
        known = quantizer.known_scale()
        if known is not None:
            return known
        if projected.beta is None:
            return quantizer.scale_for(w_NK)
        largest = torch.linalg.vector_norm(
            w_NK.view(self._experts, -1), float("inf"), 1, dtype=torch.float32
        )
        return quantizer.scale_for((largest * projected.beta).view(1, -1))

    def _multiply_output(self, row: torch.Tensor, x: Scale, tokens: ExpertTokens) -> torch.Tensor:
        return self._sparse("output", row, x, tokens)

    def prepare_grad_output(
        self, dz_TN: torch.Tensor, tokens: ExpertTokens, seed: SeedLike
    ) -> Fp8ExpertGradOutput:
        if not self.draws:
            return super().prepare_grad_output(dz_TN, tokens, seed)
        assert tokens.groups is not None
        quantizers = self._quantizers
        with self._probe.timer.span("preparation"):
            dz = quantizers.gradient.scale_for(dz_TN, dtype=self._row_dtype)
            draw = quantizers.draw.scale_for_draws(lambda: amax_of(dz_TN), MVUE_HEADROOM, dz)
            row, packed = grad_pack24_experts(
                dz_TN,
                tokens.counts,
                tokens.groups,
                seed=seed,
                row_scale=dz.scale,
                row_dtype=self._row_dtype,
                packed_scale=draw.scale,
                channels=self._channels,
                exact=self._recipe.mvue == "exact",
                row_amax=dz.amax,
                packed_amax=draw.amax,
                error_flag=self._error_flag,
            )
        assert row is not None
        if self._probe.asked:
            self._tell("grad_output", dz_TN, row)
            drawn = torch.cat([one.values.float().flatten() for one in packed])
            self._probe.mvue(dz_TN, drawn * draw.scale_inv, self._recipe)
        return Fp8ExpertGradOutput(row, packed, tokens, dz, draw)

    def grad_input(self, operands: Fp8ExpertGradOutput) -> torch.Tensor:
        assert self._operands is not None
        other, dz = self._operands[1], operands.row_scale
        if isinstance(other, PackedStack):
            return self._sparse("grad_input", operands.row, dz, operands.tokens)
        assert other is not None
        counts = operands.tokens.counts
        return scaled_products(operands.row, other, counts, dz, self._weight_now(), self._grouped)

    def grad_weight(self, operands: Fp8ExpertGradOutput, saved: SavedInput) -> torch.Tensor:
        packed = operands.along_tokens
        if isinstance(packed, torch.Tensor):
            return super().grad_weight(operands, saved)
        x_KT, counts, draw = saved[0], operands.tokens.counts, operands.along_scale
        x = self._quantizers.x.scale_of_saved(saved[1:])

        def products(algorithm: int, streams: Streams) -> torch.Tensor:
            def product(alpha: float) -> torch.Tensor:
                return each_sum(packed, x_KT, counts, algorithm, streams, True, alpha).flatten(0, 1)

            return undone(product, draw, x)

        def dense() -> torch.Tensor:
            drawn = torch.cat([one.stored().view(torch.uint8) for one in packed], 1).view(E4M3)
            return scaled_sums(drawn, x_KT, counts, draw, x, self._grouped).flatten(0, 1)

        # Dense or not, MVUE's draws are part of the result: only the algorithm is chosen.
        shape, rows = (packed[0].shape[0], x_KT.shape[0]), x_KT.shape[1]
        choice = self._choices.choose(self._chooser, "grad_weight", shape, rows, products, dense)
        self.ran_sparse.add("grad_weight")
        return products(choice.algorithm, choice.streams)

    def _sparse(
        self, name: str, a: torch.Tensor, scale: Scale, tokens: ExpertTokens
    ) -> torch.Tensor:
        """`a_e @ W_e^T` of the packed W of every expert, or dense where that is faster."""
        stack, weight, counts = self._packed_of(name), self._weight_now(), tokens.counts

        def products(algorithm: int, streams: Streams) -> torch.Tensor:
            def product(alpha: float) -> torch.Tensor:
                return each_product(stack.each, a, counts, algorithm, streams, alpha)

            return undone(product, scale, weight)

        def dense(b: torch.Tensor) -> torch.Tensor:
            return scaled_products(a, b, counts, scale, weight, self._grouped)

        unpacked = functools.cache(lambda: _stored(stack))  # once for all that is timed
        choice = self._choices.choose(
            self._chooser,
            name,
            stack.each[0].shape,
            a.shape[0],
            products,
            lambda: dense(unpacked()),
        )
        if choice.dense_wins:
            if name not in self._unpacked:
                self._unpacked[name] = unpacked()
            return dense(self._unpacked[name])
        self.ran_sparse.add(name)
        return products(choice.algorithm, choice.streams)

    def _packed_of(self, name: str) -> PackedStack:
        assert self._operands is not None
        stack = self._operands[0 if name == "output" else 1]
        assert isinstance(stack, PackedStack)
        return stack


def _stored(stack: PackedStack) -> torch.Tensor:
    """`(E, N, K)` e4m3, of the packed matrices."""
    return torch.stack([one.stored().view(torch.uint8) for one in stack.each]).view(E4M3)
