"""FP8 GEMMs of experts whose weights are 2:4, packed in e4m3.

x of the tokens, and the activation with its probability, leave one kernel each as both operands
that GEMMs read, where scales are known before: row-major, and transposed expert by expert.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from functools import partial

import torch

from megasparse.fp8.current import amax_of
from megasparse.fp8.scale import Scale
from megasparse.kernels import (
    Activation,
    activation_float8,
    effective_weight,
    gather_float8,
    grad_pack24_experts,
    weight_pack24_experts,
)
from megasparse.kernels.factors import Factors
from megasparse.kernels.float8 import blocks_of
from megasparse.kernels.packed24 import E4M3, Packed24, PackedStack
from megasparse.kernels.random import SeedLike
from megasparse.kernels.weight_pack24.experts import ExpertOperands
from megasparse.sparsity.gemms.choice import GemmChooser, shared_chooser
from megasparse.sparsity.gemms.dense_fp8 import OperandQuantizers, kept_scale
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
from megasparse.sparsity.gemms.fp8_experts import DenseFp8ExpertGemms, Fp8ExpertGradOutput
from megasparse.sparsity.gemms.fp8_products import undone, with_factors
from megasparse.sparsity.gemms.packed_fp8 import MVUE_HEADROOM
from megasparse.sparsity.gemms.protocol import SavedInput
from megasparse.sparsity.probe import Probe
from megasparse.sparsity.projection import Projected
from megasparse.sparsity.recipe import SparsityRecipe
from megasparse.sparsity.shard import ShardSlice


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
            self._probe.fp8("weight", pruned, _values(packed))

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

    def output_and_saved(
        self, x_TK: torch.Tensor, tokens: ExpertTokens
    ) -> tuple[torch.Tensor, SavedInput]:
        if not self.draws:
            return super().output_and_saved(x_TK, tokens)
        return self._output_of_rows(x_TK, None, tokens, True)

    def output_of_tokens(
        self, x_TK: torch.Tensor, tokens: ExpertTokens, save: bool
    ) -> tuple[torch.Tensor, SavedInput]:
        sources = tokens.sources_of_tokens
        if sources is None or not self.draws:
            return super().output_of_tokens(x_TK, tokens, save)
        return self._output_of_rows(x_TK, sources, tokens, save)

    def output_of_activated(
        self,
        projected_TF: torch.Tensor,
        weights_T: torch.Tensor,
        activation: Activation,
        tokens: ExpertTokens,
        save: bool,
    ) -> tuple[torch.Tensor, SavedInput]:
        x = self._quantizers.x.known_scale()
        if x is None or not self.draws:  # the scale follows from the whole activation
            return super().output_of_activated(projected_TF, weights_T, activation, tokens, save)
        row, blocks = activation_float8(
            projected_TF,
            scale=x.scale,
            activation=activation,
            transposed=save,
            amax=x.amax if save else None,
            weights=weights_T.float(),
            counts=tokens.counts,
        )
        return self._multiply_output(row, x, tokens), self._saved(blocks, x)

    def _output_of_rows(
        self, x_TK: torch.Tensor, sources: torch.Tensor | None, tokens: ExpertTokens, save: bool
    ) -> tuple[torch.Tensor, SavedInput]:
        """Of rows, or of tokens if `sources` are given; x is saved expert by expert."""
        some = x_TK if len(x_TK) else x_TK.new_zeros(1, x_TK.shape[1])
        x = self._quantizers.x.scale_for(some)
        row, blocks = gather_float8(
            some,
            sources,
            tokens.counts,
            scale=x.scale,
            transposed=save,
            amax=x.amax if save else None,
        )
        return self._multiply_output(row, x, tokens), self._saved(blocks, x)

    def _saved(self, blocks: torch.Tensor | None, x: Scale) -> SavedInput:
        return () if blocks is None else (blocks, *self._quantizers.x.saved_with(x))

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
            self._probe.fp8("grad_output", dz_TN, row)
            # By bytes: torch does not join every 8-bit format everywhere.
            drawn = torch.cat([one.values.view(torch.uint8).flatten() for one in packed])
            self._probe.mvue(dz_TN, drawn.view(E4M3), self._recipe, draw.scale_inv)
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
        if isinstance(operands.along_tokens, torch.Tensor):
            return super().grad_weight(operands, saved)
        return undone(*self._weight_gradient(operands.along_tokens, operands, saved))

    def grad_weight_to_scale(
        self, operands: Fp8ExpertGradOutput, saved: SavedInput
    ) -> tuple[torch.Tensor, Factors | None]:
        if isinstance(operands.along_tokens, torch.Tensor):
            return super().grad_weight_to_scale(operands, saved)
        return with_factors(*self._weight_gradient(operands.along_tokens, operands, saved))

    def _weight_gradient(
        self, packed: Sequence[Packed24], operands: Fp8ExpertGradOutput, saved: SavedInput
    ) -> tuple[Callable[[float], torch.Tensor], Scale, Scale]:
        """The product with a factor, and the scales that it is to undo."""
        counts, draw = operands.tokens.counts, operands.along_scale
        x_KT, x = blocks_of(saved[0], counts), self._quantizers.x.scale_of_saved(saved[1:])

        def product(algorithm: int, streams: Streams, alpha: float) -> torch.Tensor:
            return each_sum(packed, x_KT, counts, algorithm, streams, True, alpha).flatten(0, 1)

        def products(algorithm: int, streams: Streams) -> torch.Tensor:
            return undone(partial(product, algorithm, streams), draw, x)

        def dense() -> torch.Tensor:
            drawn, along = (
                torch.cat([one.view(torch.uint8) for one in parts], 1).view(E4M3)
                for parts in ([one.stored() for one in packed], x_KT)
            )
            return scaled_sums(drawn, along, counts, draw, x, self._grouped).flatten(0, 1)

        # Dense or not, MVUE's draws are part of the result: only the algorithm is chosen.
        shape, rows = (packed[0].shape[0], x_KT[0].shape[0]), sum(counts)
        choice = self._choices.choose(self._chooser, "grad_weight", shape, rows, products, dense)
        self.ran_sparse.add("grad_weight")
        return partial(product, choice.algorithm, choice.streams), draw, x

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


def _values(stack: PackedStack) -> torch.Tensor:
    """What the packed matrices keep, `(E, N, K / 2)` e4m3."""
    return torch.stack([one.values.view(torch.uint8) for one in stack.each]).view(E4M3)


def _stored(stack: PackedStack) -> torch.Tensor:
    """`(E, N, K)` e4m3, of the packed matrices."""
    return torch.stack([one.stored().view(torch.uint8) for one in stack.each]).view(E4M3)
