"""The three GEMMs in plain torch: dense, and 2:4 computed densely, which any device can."""

from __future__ import annotations

import torch

from megasparse.kernels import mvue24
from megasparse.kernels.random import SeedLike
from megasparse.sparsity.gemms.protocol import (
    Deferred,
    GradOutput,
    PlainOperands,
    SavedInput,
    kept_in_place,
    with_bias,
)
from megasparse.sparsity.probe import Probe
from megasparse.sparsity.projection import Projected, double_pruned, effective
from megasparse.sparsity.recipe import SparsityRecipe
from megasparse.sparsity.shard import ALL_TOKENS, ShardSlice, TokenShare


class DenseGemms(PlainOperands):
    """All three GEMMs dense.

    Args:
        w_NK: the weight, if it is never refilled.
    """

    _w_NK: torch.Tensor

    def __init__(self, w_NK: torch.Tensor | None = None) -> None:
        self.ran_sparse: set[str] = set()
        if w_NK is not None:
            self.refill(w_NK, None)

    def refill(self, w_NK: torch.Tensor, projected: Projected | None) -> None:
        self._w_NK = w_NK.detach()

    def output(self, x_TK: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if x_TK.is_cuda:
            return torch.nn.functional.linear(x_TK, self._w_NK, bias)
        return with_bias(x_TK @ self._w_NK.t(), bias)

    def grad_input(self, operands: GradOutput, deferred: Deferred | None = None) -> torch.Tensor:
        return operands.dz_TN @ self._w_NK

    def grad_weight(self, operands: GradOutput, saved: SavedInput) -> torch.Tensor:
        return operands.dz_TN.t() @ saved[0]


class ReferenceSparseGemms(DenseGemms):
    """2:4 GEMMs computed densely on pruned operands: what the hardware computes, on any device.

    Args:
        recipe: how dZ^T is pruned along tokens, and whether W~ is pruned again for grad_input.
        channels: where the local output channels lie in the whole layer, so that every
            tensor-parallel degree draws the same random numbers.
        probe: is told what is drawn and rounded.
        tokens: which tokens of a micro-batch are here; all by default.
    """

    def __init__(
        self,
        recipe: SparsityRecipe,
        channels: tuple[ShardSlice, ...],
        probe: Probe | None = None,
        tokens: TokenShare = ALL_TOKENS,
    ) -> None:
        super().__init__()
        self._recipe = recipe
        self._channels, self._tokens = channels, tokens
        self._probe = probe or Probe()
        self._effective_NK: torch.Tensor | None = None
        self._double_pruned_NK: torch.Tensor | None = None

    def refill(self, w_NK: torch.Tensor, projected: Projected | None) -> None:
        assert projected is not None
        pruned = effective(w_NK.detach(), projected)
        self._w_NK = self._effective_NK = kept_in_place(self._effective_NK, pruned)
        if self._recipe.double_pruned:
            again = double_pruned(pruned, projected.nan_flag)
            self._double_pruned_NK = kept_in_place(self._double_pruned_NK, again)

    @property
    def _of_grad_input(self) -> torch.Tensor:
        """The weight that grad_input multiplies: W~, or W~_d."""
        return self._w_NK if self._double_pruned_NK is None else self._double_pruned_NK

    def grad_input(self, operands: GradOutput, deferred: Deferred | None = None) -> torch.Tensor:
        return operands.dz_TN @ self._of_grad_input

    def grad_weight(self, operands: GradOutput, saved: SavedInput) -> torch.Tensor:
        return self._drawn(operands).t() @ saved[0]

    def _drawn(self, operands: GradOutput) -> torch.Tensor:
        if self._recipe.mvue == "off":
            return operands.dz_TN
        return self._prune_along_tokens(*operands)

    def _prune_along_tokens(self, dz_TN: torch.Tensor, seed: SeedLike) -> torch.Tensor:
        with self._probe.timer.span("preparation"):
            places = self._tokens.places(dz_TN.shape[0])
            runs = dz_TN.tensor_split([start for start, _ in places[1:]])
            parts = [self._pruned(run, p, seed) for run, (_, p) in zip(runs, places, strict=True)]
            pruned = parts[0] if len(parts) == 1 else torch.cat(parts)
        self._probe.mvue(dz_TN, pruned, self._recipe)
        return pruned

    def _pruned(self, run_TN: torch.Tensor, token: int, seed: SeedLike) -> torch.Tensor:
        """Of consecutive tokens, the first of which is `token` of the micro-batch."""
        parts = [
            mvue24(
                run_TN.narrow(1, s.local_start, s.length),
                seed=seed,
                dim=0,
                offsets=(token, s.global_start),
                exact=self._recipe.mvue == "exact",
                strided=self._recipe.strided_groups,
            )
            for s in self._channels
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
