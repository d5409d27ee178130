"""The three GEMMs of all experts of a layer, whose weights are one stacked matrix.

`w` is `(E N, K)`: the weights of E experts one after the other, so that projection, mask, scales
and packing are one pass over all of them. Tokens come sorted by expert, `counts` of each.

    output       z_TN  rows of expert e:  x_e @ W~_e^T
    grad_input   dx_TK rows of expert e:  dz_e @ W~_e
    grad_weight  dw    block e:           MVUE(dz_e^T) @ x_e

MVUE samples groups of four tokens. Which tokens are a group, and which numbers it draws, must not
depend on the rank that an expert is on, nor on who else's tokens are there: a group has tokens of
one micro-batch alone, in their order, and draws the numbers of its first token (`Arrivals`). They
are neighbours among an expert's tokens, whatever the recipe says of other layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from megasparse.kernels import mvue24
from megasparse.kernels.random import SeedLike
from megasparse.sparsity.gemms.protocol import kept_in_place
from megasparse.sparsity.probe import Probe
from megasparse.sparsity.projection import Projected, double_pruned, effective
from megasparse.sparsity.recipe import SparsityRecipe
from megasparse.sparsity.shard import ShardSlice


@dataclass(frozen=True)
class Draws:
    """Where the tokens of the experts go for MVUE, in groups of four.

    Attributes:
        source: int64 (T',), of every place the token that is there; T stands for a row of zeros.
        counts: places of each expert; a multiple of `multiple`.
        groups: int64 (T' / 4,), below 2^32: what each group draws by.
    """

    source: torch.Tensor
    counts: list[int]
    groups: torch.Tensor


@dataclass(frozen=True)
class Arrivals:
    """The tokens that have come to the experts of a rank, sorted by expert.

    Attributes:
        counts: tokens of each expert.
        places: int64 (T,), of each token its place in the batch of the step: micro-batch x tokens
            of a micro-batch + token. None where nobody draws.
        tokens: of a micro-batch.
        first, total: the number of the first expert, and of all experts of the layer.
    """

    counts: list[int]
    places: torch.Tensor | None = None
    tokens: int = 1
    first: int = 0
    total: int = 1

    def draws(self, multiple: int = 4) -> Draws:
        """The groups for MVUE. It waits for the device, which counts the tokens.

        Args:
            multiple: of 4, that the places of an expert are padded to.
        """
        assert self.places is not None, "no places were sent with the tokens"
        places, device = self.places, self.places.device
        counts = torch.tensor(self.counts, device=device)
        expert = torch.repeat_interleave(torch.arange(len(counts), device=device), counts)
        batches = int(places.max()) // self.tokens + 1 if len(places) else 1
        segment = expert * batches + places // self.tokens
        order = torch.argsort(segment * self.tokens + places % self.tokens)
        segment = segment[order]
        sizes = torch.bincount(segment, minlength=len(counts) * batches).view(-1, batches)
        padded = (sizes + 3) // 4 * 4
        # What is left to a multiple for an expert comes behind its last segment.
        room = padded.sum(1)
        whole = (room + multiple - 1) // multiple * multiple
        starts = (whole.cumsum(0) - whole)[:, None] + padded.cumsum(1) - padded
        begins = (sizes.reshape(-1).cumsum(0) - sizes.reshape(-1))[segment]
        spots = starts.reshape(-1)[segment] + torch.arange(len(order), device=device) - begins
        per_expert: list[int] = whole.tolist()
        source = torch.full((sum(per_expert),), len(places), dtype=torch.int64, device=device)
        source[spots] = order
        leaders = source[::4].clamp(max=max(len(places) - 1, 0))
        if not len(places):
            return Draws(source, per_expert, leaders)
        number = (places * self.total + self.first)[leaders] + expert[leaders]
        return Draws(source, per_expert, number % (1 << 32))


class ExpertGemms(Protocol):
    """What an expert layer computes with; see the module.

    Attributes:
        ran_sparse: names of the GEMMs that have run on sparse tensor cores.
    """

    ran_sparse: set[str]

    def refill(self, w_NK: torch.Tensor, projected: Projected | None) -> None:
        """Make the operands of the stacked weight `(E N, K)` for an optimizer step."""
        ...

    def output(self, x_TK: torch.Tensor, arrivals: Arrivals) -> torch.Tensor:
        """`(T, N)` in the dtype of x."""
        ...

    def grad_input(self, dz_TN: torch.Tensor, arrivals: Arrivals) -> torch.Tensor:
        """`(T, K)` in the dtype of dz."""
        ...

    def grad_weight(
        self, dz_TN: torch.Tensor, x_TK: torch.Tensor, arrivals: Arrivals, seed: SeedLike
    ) -> torch.Tensor:
        """`(E N, K)`: straight through to the dense master weight; zero for an expert without
        tokens."""
        ...


class DenseExpertGemms:
    """All three GEMMs dense.

    Args:
        experts: E of this rank.
        grouped: one launch for all experts, where the device has such a GEMM (16 bits on a GPU).
        w_NK: the stacked weight, if it is never refilled.
    """

    _w_NK: torch.Tensor

    def __init__(
        self, experts: int, grouped: bool = False, w_NK: torch.Tensor | None = None
    ) -> None:
        self.ran_sparse: set[str] = set()
        self._experts, self._grouped = experts, grouped
        if w_NK is not None:
            self.refill(w_NK, None)

    def refill(self, w_NK: torch.Tensor, projected: Projected | None) -> None:
        self._w_NK = w_NK.detach()

    def output(self, x_TK: torch.Tensor, arrivals: Arrivals) -> torch.Tensor:
        weights = self._weights()
        if self._in_one_launch(x_TK):
            return _grouped_mm(x_TK, weights.transpose(1, 2), arrivals.counts)
        z_TN = x_TK.new_empty(x_TK.shape[0], weights.shape[1])
        for w, x, z in zip(weights, *_split(arrivals.counts, x_TK, z_TN), strict=True):
            torch.mm(x, w.t(), out=z)
        return z_TN

    def grad_input(self, dz_TN: torch.Tensor, arrivals: Arrivals) -> torch.Tensor:
        weights = self._of_grad_input()
        if self._in_one_launch(dz_TN):
            return _grouped_mm(dz_TN, weights, arrivals.counts)
        dx_TK = dz_TN.new_empty(dz_TN.shape[0], weights.shape[2])
        for w, dz, dx in zip(weights, *_split(arrivals.counts, dz_TN, dx_TK), strict=True):
            torch.mm(dz, w, out=dx)
        return dx_TK

    def grad_weight(
        self, dz_TN: torch.Tensor, x_TK: torch.Tensor, arrivals: Arrivals, seed: SeedLike
    ) -> torch.Tensor:
        return self._weight_gradients(dz_TN, x_TK, arrivals.counts)

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
        self._recipe = replace(recipe, mvue_groups="neighbours")
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

    def grad_weight(
        self, dz_TN: torch.Tensor, x_TK: torch.Tensor, arrivals: Arrivals, seed: SeedLike
    ) -> torch.Tensor:
        if self._recipe.mvue == "off":
            return self._weight_gradients(dz_TN, x_TK, arrivals.counts)
        draws = arrivals.draws()
        pruned = self._drawn(dz_TN, draws, seed)
        return self._weight_gradients(pruned, rows_at(x_TK, draws.source), draws.counts)

    def _drawn(self, dz_TN: torch.Tensor, draws: Draws, seed: SeedLike) -> torch.Tensor:
        """MVUE(dZ) `(T', N)` of all experts, in one pass for each slice of channels."""
        with self._probe.timer.span("preparation"):
            dz_TN = rows_at(dz_TN, draws.source)
            parts = [
                mvue24(
                    dz_TN.narrow(1, s.local_start, s.length),
                    seed=seed,
                    dim=0,
                    offsets=(0, s.global_start),
                    exact=self._recipe.mvue == "exact",
                    groups=draws.groups,
                )
                for s in self._channels
            ]
            pruned = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        self._probe.mvue(dz_TN, pruned, self._recipe)
        return pruned


def rows_at(x: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """`x (T, C)` at the places of `Draws.source`, `(T', C)`; zeros where no token is."""
    return torch.cat([x, x.new_zeros(1, x.shape[1])])[source]


def _split(counts: Sequence[int], *tensors: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    return [tensor.split(list(counts)) for tensor in tensors]


def _grouped_mm(a: torch.Tensor, b: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """torch's GEMM of groups of rows (or, of two matrices, of the dimension that is summed)."""
    ends = torch.tensor(counts, dtype=torch.int32).cumsum(0, dtype=torch.int32).to(a.device)
    product: torch.Tensor = torch.nn.functional.grouped_mm(a, b, offs=ends)
    return product
