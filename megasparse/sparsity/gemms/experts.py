"""The three GEMMs of all experts of a layer, whose weights are one stacked matrix.

`w` is `(E N, K)`: the weights of E experts one after the other, so that projection, mask, scales
and packing are one pass over all of them. Rows of tokens come sorted by expert, in whole tiles
(`expert_tokens.py`).

    output       z_TN  rows of expert e:  x_e @ W~_e^T
    grad_input   dx_TK rows of expert e:  dz_e @ W~_e
    grad_weight  dw    block e:           MVUE(dz_e^T) @ x_e
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch

from megasparse.kernels import Activation, mvue24, weighted_activation
from megasparse.kernels.factors import Factors
from megasparse.kernels.random import SeedLike
from megasparse.sparsity.gemms.expert_tokens import ExpertTokens
from megasparse.sparsity.gemms.protocol import SavedInput, kept_in_place
from megasparse.sparsity.gradient_sum import GradientSum
from megasparse.sparsity.probe import Probe
from megasparse.sparsity.projection import Projected, double_pruned, effective
from megasparse.sparsity.recipe import SparsityRecipe
from megasparse.sparsity.shard import ShardSlice


class ExpertGemms(Protocol):
    """What an expert layer computes with; see the module, and `LinearGemms`.

    Attributes:
        ran_sparse: names of the GEMMs that have run on sparse tensor cores.
        tile: the rows of an expert are a multiple of it.
        draws: whether grad_weight draws, and rows come in groups.
        total: None: gradients are autograd's.
    """

    ran_sparse: set[str]
    tile: int
    draws: bool
    total: GradientSum | None

    def refill(self, w_NK: torch.Tensor, projected: Projected | None) -> None:
        """Make the operands of the stacked weight `(E N, K)` for an optimizer step."""
        ...

    def output(self, x_TK: torch.Tensor, tokens: ExpertTokens) -> torch.Tensor:
        """`(T', N)` in the dtype of x."""
        ...

    def output_and_saved(
        self, x_TK: torch.Tensor, tokens: ExpertTokens
    ) -> tuple[torch.Tensor, SavedInput]:
        """The same, and what `grad_weight` needs of x."""
        ...

    def output_of_tokens(
        self, x_TK: torch.Tensor, tokens: ExpertTokens, save: bool
    ) -> tuple[torch.Tensor, SavedInput]:
        """`output` or, with `save`, `output_and_saved` of x `(T, K)` as the tokens have come."""
        ...

    def output_of_activated(
        self,
        projected_TF: torch.Tensor,
        weights_T: torch.Tensor,
        activation: Activation,
        tokens: ExpertTokens,
        save: bool,
    ) -> tuple[torch.Tensor, SavedInput]:
        """The same of `weighted_activation`, whose rows are as `tokens` says."""
        ...

    def prepare_grad_output(self, dz_TN: torch.Tensor, tokens: ExpertTokens, seed: SeedLike) -> Any:
        """What `grad_input` and `grad_weight` need of dZ."""
        ...

    def grad_input(self, operands: Any) -> torch.Tensor:
        """`(T', K)` in the dtype of dz."""
        ...

    def grad_weight(self, operands: Any, saved: SavedInput) -> torch.Tensor:
        """`(E N, K)`: straight through to the dense master weight; zero for an expert without
        tokens."""
        ...

    def grad_weight_to_scale(
        self, operands: Any, saved: SavedInput
    ) -> tuple[torch.Tensor, Factors | None]:
        """`grad_weight`, and the factors of `accumulate_` that it still lacks."""
        ...


class StepByStep(ABC):
    """Rows and activations in full: for GEMMs that do nothing with them by the way."""

    @abstractmethod
    def output(self, x_TK: torch.Tensor, tokens: ExpertTokens) -> torch.Tensor:
        """See `ExpertGemms`."""

    @abstractmethod
    def output_and_saved(
        self, x_TK: torch.Tensor, tokens: ExpertTokens
    ) -> tuple[torch.Tensor, SavedInput]:
        """See `ExpertGemms`."""

    @abstractmethod
    def grad_weight(self, operands: Any, saved: SavedInput) -> torch.Tensor:
        """See `ExpertGemms`."""

    def output_of_tokens(
        self, x_TK: torch.Tensor, tokens: ExpertTokens, save: bool
    ) -> tuple[torch.Tensor, SavedInput]:
        return self._output(tokens.rows(x_TK), tokens, save)

    def output_of_activated(
        self,
        projected_TF: torch.Tensor,
        weights_T: torch.Tensor,
        activation: Activation,
        tokens: ExpertTokens,
        save: bool,
    ) -> tuple[torch.Tensor, SavedInput]:
        y_TK = weighted_activation(projected_TF, weights_T, activation)
        return self._output(y_TK, tokens, save)

    def grad_weight_to_scale(
        self, operands: Any, saved: SavedInput
    ) -> tuple[torch.Tensor, Factors | None]:
        return self.grad_weight(operands, saved), None

    def _output(
        self, x_TK: torch.Tensor, tokens: ExpertTokens, save: bool
    ) -> tuple[torch.Tensor, SavedInput]:
        if save:
            return self.output_and_saved(x_TK, tokens)
        return self.output(x_TK, tokens), ()


class ExpertGradOutput(NamedTuple):
    """dZ as it came, whose rows it has, and the seed of what is drawn from it."""

    dz_TN: torch.Tensor
    tokens: ExpertTokens
    seed: SeedLike


class DenseExpertGemms(StepByStep):
    """All three GEMMs dense.

    Args:
        experts: E of this rank.
        grouped: one launch for all experts, where the device has such a GEMM (16 bits on a GPU).
        w_NK: the stacked weight, if it is never refilled.
    """

    _w_NK: torch.Tensor
    tile, draws = 1, False

    def __init__(
        self, experts: int, grouped: bool = False, w_NK: torch.Tensor | None = None
    ) -> None:
        self.ran_sparse: set[str] = set()
        self.total: GradientSum | None = None
        self._experts, self._grouped = experts, grouped
        if w_NK is not None:
            self.refill(w_NK, None)

    def refill(self, w_NK: torch.Tensor, projected: Projected | None) -> None:
        self._w_NK = w_NK.detach()

    def output(self, x_TK: torch.Tensor, tokens: ExpertTokens) -> torch.Tensor:
        return self._products(x_TK, self._weights().transpose(1, 2), tokens)

    def output_and_saved(
        self, x_TK: torch.Tensor, tokens: ExpertTokens
    ) -> tuple[torch.Tensor, SavedInput]:
        return self.output(x_TK, tokens), (x_TK,)

    def prepare_grad_output(
        self, dz_TN: torch.Tensor, tokens: ExpertTokens, seed: SeedLike
    ) -> ExpertGradOutput:
        return ExpertGradOutput(dz_TN, tokens, seed)

    def grad_input(self, operands: ExpertGradOutput) -> torch.Tensor:
        return self._products(operands.dz_TN, self._of_grad_input(), operands.tokens)

    def grad_weight(self, operands: ExpertGradOutput, saved: SavedInput) -> torch.Tensor:
        return self._weight_gradients(operands.dz_TN, saved[0], operands.tokens.counts)

    def _products(self, a: torch.Tensor, b: torch.Tensor, tokens: ExpertTokens) -> torch.Tensor:
        """`a_e @ b_e` of every expert: `a (T', C)`, `b (E, C, D)`."""
        if self._in_one_launch(a):
            return _grouped_mm(a, b, tokens.counts)
        product = a.new_empty(a.shape[0], b.shape[2])
        for w, rows, out in zip(b, *_split(tokens.counts, a, product), strict=True):
            torch.mm(rows, w, out=out)
        return product

    def _weight_gradients(
        self, dz_TN: torch.Tensor, x_TK: torch.Tensor, counts: Sequence[int]
    ) -> torch.Tensor:
        if self._in_one_launch(dz_TN):
            return _grouped_mm(dz_TN.t(), x_TK, counts).flatten(0, 1)
        dw = x_TK.new_empty(self._experts, dz_TN.shape[1], x_TK.shape[1])
        for block, dz, x in zip(dw, *_split(counts, dz_TN, x_TK), strict=True):
            torch.mm(dz.t(), x, out=block)
        return dw.flatten(0, 1)

    def _weights(self) -> torch.Tensor:
        return self._w_NK.unflatten(0, (self._experts, -1))

    def _of_grad_input(self) -> torch.Tensor:
        """The weights `(E, N, K)` that grad_input multiplies."""
        return self._weights()

    def _in_one_launch(self, like: torch.Tensor) -> bool:
        return self._grouped and like.is_cuda and like.dtype == torch.bfloat16


class ReferenceExpertGemms(DenseExpertGemms):
    """2:4 GEMMs computed densely on pruned operands: what the hardware computes, on any device.

    Args:
        experts: E of this rank.
        recipe: how dZ^T is pruned along tokens, and W~ for grad_input.
        channels: where an expert's local outputs lie among its own.
        probe: is told what is drawn.
        grouped: as of dense ones.
    """

    def __init__(
        self,
        experts: int,
        recipe: SparsityRecipe,
        channels: tuple[ShardSlice, ...],
        probe: Probe | None = None,
        grouped: bool = False,
    ) -> None:
        super().__init__(experts, grouped)
        self._recipe = neighbours(recipe)
        self.draws = recipe.mvue != "off"
        self._channels, self._probe = channels, probe or Probe()
        self._effective: torch.Tensor | None = None
        self._double_pruned: torch.Tensor | None = None

    def refill(self, w_NK: torch.Tensor, projected: Projected | None) -> None:
        assert projected is not None
        pruned = effective(w_NK.detach(), projected)
        self._w_NK = self._effective = kept_in_place(self._effective, pruned)
        if self._recipe.double_pruned:
            again = double_pruned(pruned, projected.nan_flag)
            self._double_pruned = kept_in_place(self._double_pruned, again)

    def _of_grad_input(self) -> torch.Tensor:
        if self._double_pruned is None:
            return self._weights()
        return self._double_pruned.unflatten(0, (self._experts, -1))

    def grad_weight(self, operands: ExpertGradOutput, saved: SavedInput) -> torch.Tensor:
        dz_TN = self._drawn(operands) if self.draws else operands.dz_TN
        return self._weight_gradients(dz_TN, saved[0], operands.tokens.counts)

    def _drawn(self, operands: ExpertGradOutput) -> torch.Tensor:
        """MVUE(dZ) `(T', N)` of all experts, in one pass for each slice of channels."""
        dz_TN, tokens, seed = operands
        with self._probe.timer.span("preparation"):
            parts = [
                mvue24(
                    dz_TN.narrow(1, s.local_start, s.length),
                    seed=seed,
                    dim=0,
                    offsets=(0, s.global_start),
                    exact=self._recipe.mvue == "exact",
                    groups=tokens.groups,
                )
                for s in self._channels
            ]
            pruned = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        self._probe.mvue(dz_TN, pruned, self._recipe)
        return pruned


def neighbours(recipe: SparsityRecipe) -> SparsityRecipe:
    """The recipe of experts: groups for MVUE are neighbours."""
    return replace(recipe, mvue_groups="neighbours")


def ends_of(counts: Sequence[int], device: torch.device) -> torch.Tensor:
    """int32 (E,): where the rows of each expert end, as grouped GEMMs want it."""
    ends = torch.tensor(counts, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return ends.to(device, non_blocking=True)


def _split(counts: Sequence[int], *tensors: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    return [tensor.split(list(counts)) for tensor in tensors]


def _grouped_mm(a: torch.Tensor, b: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """torch's GEMM of groups of rows (or, of two matrices, of the dimension that is summed)."""
    product: torch.Tensor = torch.nn.functional.grouped_mm(a, b, offs=ends_of(counts, a.device))
    return product
