"""The sparsity of a whole model: one clock for all layers, and what a run reports about them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from megasparse.errors import KernelError, NumericsError
from megasparse.kernels import derive_seed
from megasparse.sparsity import schedule
from megasparse.sparsity.recipe import SparsityRecipe
from megasparse.sparsity.state import SparseWeight


@dataclass
class Clock:
    """Where the run is; shared by all sparse layers, set by the training loop.

    Attributes:
        seed: the run's seed.
        train_iters: length of the run, for the schedule.
        step: optimizer steps done.
        micro_batch: number of the micro-batch within the step, over all data-parallel ranks, so
            that a micro-batch draws the same random numbers whichever rank computes it.
    """

    seed: int
    train_iters: int
    step: int = 0
    micro_batch: int = 0

    def mvue_seed(self, layer: int) -> int:
        """Seed of one layer's MVUE draws in the current micro-batch."""
        return derive_seed(self.seed, self.step, self.micro_batch, layer)

    @contextlib.contextmanager
    def at(self, micro_batch: int) -> Iterator[None]:
        """Set back to a micro-batch for a while: a layer is recomputed with the draws it had."""
        before, self.micro_batch = self.micro_batch, micro_batch
        try:
            yield
        finally:
            self.micro_batch = before


@dataclass
class LayerReport:
    """Figures of one sparse weight, of this rank alone; sums so that ranks can be added up."""

    name: str
    flips: int | None  # None before the second refresh: there was nothing to compare with
    nonzeros: int
    numel: int


@dataclass
class SparsityController:
    """All sparse weights of the local model.

    Attributes:
        recipe: the method.
        clock: shared with the layers.
        monitor: keep masks and flips in dense phases.
        weights: sparse weight states with their parameters, in model order.
    """

    recipe: SparsityRecipe
    clock: Clock
    monitor: bool = True
    weights: list[tuple[SparseWeight, torch.nn.Parameter]] = field(default_factory=list)

    def register(self, state: SparseWeight, weight: torch.nn.Parameter) -> None:
        """Add a layer's weight."""
        self.weights.append((state, weight))

    @property
    def sparse_now(self) -> bool:
        """Whether the clock's step is in the sparse phase."""
        return schedule.is_sparse_step(self.recipe, self.clock.step, self.clock.train_iters)

    @property
    def refreshes(self) -> int:
        """Mask refreshes so far, over all layers; grows when there are new flip counts."""
        return sum(state.refreshes for state, _ in self.weights)

    def preparations(self, step: int) -> int:
        """Most times that any weight's operands were built for the latest step computed: once,
        whatever the number of micro-batches, recomputations and evaluations."""
        return max(
            (
                state.preparations_of_step
                for state, _ in self.weights
                if state.prepared_step == step
            ),
            default=0,
        )

    def masked_decay(self) -> float:
        """lambda of the clock's step."""
        return schedule.masked_decay(self.recipe, self.clock.step, self.clock.train_iters)

    def masked_weights(self) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
        """Parameters with their current masks (bool, like the parameter)."""
        for state, weight in self.weights:
            if state.mask is not None:
                yield weight, state.mask

    def report(
        self,
        whole: Callable[[list[torch.nn.Parameter]], Any] = lambda _: contextlib.nullcontext(),
    ) -> list[LayerReport]:
        """Flips of the last refresh and non-zeros of the effective weights (synchronises).

        Args:
            whole: makes a context in which the local weights can be read.
        """
        reports = []
        for state, weight in self.weights:
            if state.nan_seen():
                raise NumericsError(f"NaN in the weight {state.name}, found while it was pruned")
            if state.not_24_seen():
                raise KernelError(f"an operand packed for {state.name} was not 2:4")
            with whole([weight]):
                used = state.effective(weight.detach()) if self.sparse_now else weight.detach()
                reports.append(
                    LayerReport(
                        name=state.name,
                        flips=None if state.flips is None else int(state.flips),
                        nonzeros=int(torch.count_nonzero(used)),
                        numel=weight.numel(),
                    )
                )
        return reports

    def invalidate(self) -> None:
        """Rebuild all operands at their next use."""
        for state, _ in self.weights:
            state.invalidate()
