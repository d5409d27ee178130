"""2:4 GEMMs of experts on sparse tensor cores: 16-bit, by cuSPARSELt, one product an expert.

The stacked weight is projected and packed in one launch, each expert as the library reads it.
Output and grad_input of all experts are computed sparse, or by one grouped dense GEMM on the same
pruned weights where that is faster; the two are measured against each other for all experts
together, once for a range of tokens. The weight gradient stays with MVUE, whose draws are part of
the result.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from megasparse.kernels import mvue_pack24_experts, unpack24, weight_pack24_experts
from megasparse.kernels.packed24 import PackedStack
from megasparse.kernels.weight_pack24.experts import ExpertOperands
from megasparse.sparsity.gemms.choice import GemmChooser, shared_chooser
from megasparse.sparsity.gemms.expert_products import ExpertChoices, Streams, each_product, each_sum
from megasparse.sparsity.gemms.expert_tokens import ExpertTokens
from megasparse.sparsity.gemms.experts import ExpertGradOutput, ReferenceExpertGemms
from megasparse.sparsity.gemms.protocol import SavedInput
from megasparse.sparsity.probe import Probe
from megasparse.sparsity.projection import Projected, effective
from megasparse.sparsity.recipe import SparsityRecipe
from megasparse.sparsity.shard import ShardSlice

TILE = 64  # rows and columns of a packed 16-bit operand


class PackedExpertGemms(ReferenceExpertGemms):
    """The GEMMs of a sparse phase with the experts' W~ packed.

    Args:
        experts: E of this rank.
        recipe: what grad_input multiplies, and how dZ^T is pruned along tokens.
        channels: where an expert's local outputs lie among its own.
        probe: is told what MVUE draws.
        chooser: which GEMMs compute which shape; default: the GPU's own, kept on disk.
    """

    tile = TILE

    def __init__(
        self,
        experts: int,
        recipe: SparsityRecipe,
        channels: tuple[ShardSlice, ...],
        probe: Probe | None = None,
        chooser: GemmChooser | None = None,
    ) -> None:
        super().__init__(experts, recipe, channels, probe, grouped=True)
        self._chooser = chooser
        self._choices = ExpertChoices(experts, "16 bits")
        self._operands: ExpertOperands | None = None
        self._is_dense = False  # whether W~ is there as a dense matrix too

    def refill(self, w_NK: torch.Tensor, projected: Projected | None) -> None:
        assert projected is not None
        self._master, self._projected, self._is_dense = w_NK.detach(), projected, False
        if self._chooser is None:
            self._chooser = shared_chooser(w_NK.device)
        self._operands = weight_pack24_experts(
            self._master,
            self._experts,
            projected.mask,
            threshold_scale=projected.beta,
            transposed=self._recipe.packed_transpose,
            error_flag=projected.error_flag,
            nan_flag=projected.nan_flag,
            out=self._operands,
        )

    def output(self, x_TK: torch.Tensor, tokens: ExpertTokens) -> torch.Tensor:
        assert self._operands is not None
        dense = super().output
        return self._multiply(
            "output", self._operands[0], x_TK, tokens, lambda: dense(x_TK, tokens)
        )

    def grad_input(self, operands: ExpertGradOutput) -> torch.Tensor:
        assert self._operands is not None
        packed_t, dense = self._operands[1], super().grad_input
        if not isinstance(packed_t, PackedStack):
            return dense(operands)
        dz_TN, tokens, _ = operands
        return self._multiply("grad_input", packed_t, dz_TN, tokens, lambda: dense(operands))

    def grad_weight(self, operands: ExpertGradOutput, saved: SavedInput) -> torch.Tensor:
        if not self.draws:
            return super().grad_weight(operands, saved)
        counts, (x_TK,), flag = operands.tokens.counts, saved, self._projected.error_flag
        dz_TN, tokens, seed = operands
        assert tokens.groups is not None
        with self._probe.timer.span("preparation"):
            packed = mvue_pack24_experts(
                dz_TN,
                counts,
                tokens.groups,
                seed=seed,
                channels=tuple((s.local_start, s.global_start, s.length) for s in self._channels),
                exact=self._recipe.mvue == "exact",
                error_flag=flag,
            )
        if self._probe.asked:
            kept = torch.cat([one.values.flatten() for one in packed])
            self._probe.mvue(dz_TN, kept, self._recipe)

        def products(algorithm: int, streams: Streams) -> torch.Tensor:
            return each_sum(packed, x_TK, counts, algorithm, streams).flatten(0, 1)

        def dense() -> torch.Tensor:
            drawn_NT = torch.cat([one.stored() for one in packed], 1)
            return self._weight_gradients(drawn_NT.t(), x_TK, counts)

        # Dense or not, MVUE's draws are part of the result: only the algorithm is chosen.
        shape, rows = (dz_TN.shape[1], x_TK.shape[1]), x_TK.shape[0]
        choice = self._choices.choose(self._chooser, "grad_weight", shape, rows, products, dense)
        self.ran_sparse.add("grad_weight")
        return products(choice.algorithm, choice.streams)

    def _multiply(
        self,
        name: str,
        packed: PackedStack,
        a: torch.Tensor,
        tokens: ExpertTokens,
        dense: Callable[[], torch.Tensor],
    ) -> torch.Tensor:
        """`a_e @ W_e^T` of the packed W of every expert, or dense where that is faster."""

        def products(algorithm: int, streams: Streams) -> torch.Tensor:
            return each_product(packed.each, a, tokens.counts, algorithm, streams)

        shape = packed.each[0].shape
        choice = self._choices.choose(self._chooser, name, shape, a.shape[0], products, dense)
        if choice.dense_wins:
            return dense()
        self.ran_sparse.add(name)
        return products(choice.algorithm, choice.streams)

    def _weights(self) -> torch.Tensor:
        """W~ `(E, N, K)` where a dense GEMM needs it, made once a step at most."""
        if not self._is_dense:
            pruned = effective(self._master, self._projected)
            if self._effective is None:
                self._effective = pruned
            else:
                self._effective.copy_(pruned)
            self._w_NK, self._is_dense = self._effective, True
        return super()._weights()

    def _of_grad_input(self) -> torch.Tensor:
        if not self._recipe.double_pruned:
            return self._weights()
        assert self._operands is not None and isinstance(self._operands[1], PackedStack)
        return torch.stack([unpack24(packed).t() for packed in self._operands[1].each])


def refusal(
    weight: torch.Tensor, experts: int, channels: tuple[ShardSlice, ...], whole: str | None
) -> str | None:
    """Why the sparse tensor cores cannot compute the experts, or None when they can.

    Args:
        weight: stacked.
        channels: of one expert.
        whole: why they could not compute it as one linear.
    """
    rows = weight.shape[0] // experts
    if rows % TILE or any(one.length % TILE for one in channels):
        return f"an expert's shard is ({rows}, {weight.shape[1]}), expected multiples of {TILE}"
    return whole
