"""The sparsity of a whole model: one clock for all layers, and what a run reports about them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from megasparse.fp8 import Scaling
from megasparse.kernels import derive_seed
from megasparse.sparsity import schedule
from megasparse.sparsity.probe import Probe
from megasparse.sparsity.recipe import SparsityRecipe
from megasparse.sparsity.state import SparseWeight
from megasparse.timer import StepTimer


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
class SparsityController:
    """All sparse weights of the local model.

    Attributes:
        recipe: the method.
        clock: shared with the layers.
        monitor: keep masks and flips in dense phases.
        weights: sparse weight states with their parameters, in model order.
        timer: of the run.
        fp8: scaling of FP8 operands, where GEMMs are in FP8.
    """

    recipe: SparsityRecipe
    clock: Clock
    monitor: bool = True
    weights: list[tuple[SparseWeight, torch.nn.Parameter]] = field(default_factory=list)
    timer: StepTimer = field(default_factory=StepTimer)
    fp8: Scaling | None = None

    def finish_step(self) -> None:
        """After the update of a step, on all ranks: FP8 scales of the next one."""
        if self.fp8 is not None:
            self.fp8.finish_step()

    def register(self, state: SparseWeight, weight: torch.nn.Parameter) -> None:
        """Add a layer's weight."""
        state.probe = Probe(self.timer)
        self.weights.append((state, weight))

    def ask(self, wanted: bool) -> None:
        """Let the probes of all weights measure from here, or no longer."""
        for state, _ in self.weights:
            if wanted:
                state.probe.ask()
            else:
                state.probe.asked = False

    @property
    def asked(self) -> bool:
        """Whether the probes measure."""
        return any(state.probe.asked for state, _ in self.weights)

    def halved_flops_per_token(self, recomputed: float) -> float:
        """FLOPs a token that the local shards' GEMMs have saved on sparse tensor cores.

        The 2 N K of each such GEMM by a half.

        Args:
            recomputed: share of the layers whose forward, with its output GEMM, is done twice.
        """
        runs = {"output": 1.0 + recomputed}
        return sum(
            weight.numel() * sum(runs.get(gemm, 1.0) for gemm in state.ran_sparse)
            for state, weight in self.weights
        )

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

    def invalidate(self) -> None:
        """Rebuild all operands at their next use."""
        for state, _ in self.weights:
            state.invalidate()
