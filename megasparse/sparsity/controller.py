"""The sparsity of a whole model: one clock for all layers, and what a run reports about them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from megasparse.fp8 import Scaling
from megasparse.sparsity import schedule
from megasparse.sparsity.autograd.linear import Seed
from megasparse.sparsity.clock import Clock
from megasparse.sparsity.dense_weight import DenseFp8Weight
from megasparse.sparsity.gradient_sum import GradientSum, StepSums
from megasparse.sparsity.probe import Probe
from megasparse.sparsity.recipe import SparsityRecipe
from megasparse.sparsity.seeds import DeviceSeeds
from megasparse.sparsity.state import SparseWeight
from megasparse.timer import StepTimer


@dataclass
class SparsityController:
    """All sparse weights of the local model.

    Attributes:
        recipe: the method.
        clock: shared with the layers.
        monitor: keep masks and flips in dense phases.
        weights: sparse weight states with their parameters, in model order.
        dense: the FP8 operands of dense weights, with their parameters.
        timer: of the run.
        fp8: scaling of FP8 operands, where GEMMs are in FP8.
        layers: what tells the draws of each weight's layer from another's, in the same order.
        seeds: of the draws, on the device; None: taken from the host.
        calibrating: layers compute with their dense weights, in the model's precision, and their
            inputs are observed in evaluation too.
        mean_decay: of the weights' own lambdas (`optim/decay_rule.py`); None: to be
            asked for.
    """

    recipe: SparsityRecipe
    clock: Clock
    monitor: bool = True
    weights: list[tuple[SparseWeight, torch.nn.Parameter]] = field(default_factory=list)
    timer: StepTimer = field(default_factory=StepTimer)
    fp8: Scaling | None = None
    layers: list[int] = field(default_factory=list)
    seeds: DeviceSeeds | None = None
    dense: list[tuple[DenseFp8Weight, torch.nn.Parameter]] = field(default_factory=list)
    calibrating: bool = False
    mean_decay: float | None = None
    _span: tuple[int, schedule.Span] | None = field(default=None, repr=False)

    def finish_step(self) -> None:
        """After the update of a step, on all ranks: FP8 scales of the next one."""
        if self.fp8 is not None:
            self.fp8.finish_step()

    def snapshot(self) -> list[Any]:
        """What a step may change before its update, for `restore`; of one step at a time."""
        fp8 = None if self.fp8 is None else self.fp8.snapshot()
        return [fp8, *(state.snapshot() for state, _ in self.weights)]

    def restore(self, snapshot: list[Any]) -> None:
        """Put back what `snapshot` gave."""
        fp8, *states = snapshot
        if self.fp8 is not None:
            self.fp8.restore(fp8)
        for (state, _), saved in zip(self.weights, states, strict=True):
            state.restore(saved)
        for one, _ in self.dense:
            one.restore()

    def add_up_in(
        self, places: Mapping[torch.nn.Parameter, torch.Tensor], step: StepSums
    ) -> set[torch.nn.Parameter]:
        """Have the layers add up the gradients of their weights by themselves; of which weights.

        Args:
            places: of parameters' gradients.
            step: says when.
        """
        taken = set()
        for state, weight in self.weights:
            # Gradients of weights that CAST computes with are autograd's.
            if weight in places and not state.recipe.dense_forward:
                state.total = GradientSum(places[weight], step)
                taken.add(weight)
        for one, weight in self.dense:
            if weight in places:
                one.total = GradientSum(places[weight], step)
                taken.add(weight)
        return taken

    def register(self, state: SparseWeight, weight: torch.nn.Parameter, layer: int) -> int:
        """Add a layer's weight; its place among them.

        Args:
            layer: tells the layer's draws from another's.
        """
        state.probe = Probe(self.timer)
        state.train_iters = self.clock.train_iters
        self.weights.append((state, weight))
        self.layers.append(layer)
        return len(self.weights) - 1

    def begin_forward(self) -> None:
        """Before a layer's pass; a loop that sets the clock by itself needs nothing here."""

    @property
    def steps_done(self) -> int:
        """Optimizer steps, for the state of layers in a checkpoint."""
        return self.clock.step

    def set_steps_done(self, step: int) -> None:
        """Of a checkpoint that was loaded: the loop that sets the clock knows it."""

    def seed(self, place: int) -> Seed:
        """Of the draws of a layer in the current micro-batch; on the device, or an int.

        Args:
            place: of the layer's weight (`register`).
        """
        if self.seeds is not None:
            return self.seeds.of(place, self.clock.slot)
        return self.clock.mvue_seed(self.layers[place])

    def step_seed(self, place: int) -> int:
        """Of the draws of a layer of experts in the current step."""
        return self.clock.step_seed(self.layers[place])

    def begin_step(self, refresh_all: Callable[[], None] | None = None) -> None:
        """Refresh the masks that are due, and see to it that `refill` has what it needs.

        Args:
            refresh_all: a captured `refresh`, where all masks are due and stay where they are.
        """
        step, sparse = self.clock.step, self.sparse_now
        stale = [(s, w) for s, w in self.weights if s.ready_for != (step, sparse)]
        due = [s.refresh_is_due(step, sparse, self.monitor) for s, _ in stale]
        together = len(stale) == len(self.weights) and all(due)
        if refresh_all is not None and together and all(s.refreshes_in_place for s, _ in stale):
            refresh_all()
        else:
            for (state, weight), refreshed in zip(stale, due, strict=True):
                if refreshed:
                    state.refresh(weight)
        for (state, weight), refreshed in zip(stale, due, strict=True):
            state.begin_step(weight, step, sparse, refreshed)
        for one, _ in self.dense:
            one.begin_step(step)

    def refresh(self) -> None:
        """Search the masks of all weights anew; it can be captured."""
        for state, weight in self.weights:
            state.refresh(weight)

    def refill(self) -> None:
        """Make the operands of all weights but those of experts (`refill_experts`) for the step
        that has begun; it can be captured."""
        self._refill(experts=False)

    def refill_experts(self) -> None:
        """Make the operands of experts. Which GEMMs compute them depends on the tokens of each
        step, and so does what they keep of the weights: it is not captured."""
        self._refill(experts=True)

    def _refill(self, experts: bool) -> None:
        sparse = self.sparse_now
        for state, weight in self.weights:
            if (state.experts is not None) == experts:
                state.refill(weight, sparse)
        for one, weight in self.dense:
            if (one.experts is not None) == experts:
                one.refill(weight)

    @property
    def has_operands(self) -> bool:
        """Whether there is anything to be made of weights once a step."""
        return bool(self.weights or self.dense)

    @property
    def moves(self) -> int:
        """Grows when tensors of the states may have got other addresses."""
        sparse, dense = self.weights, self.dense
        return sum(one.moves for one, _ in sparse) + sum(one.moves for one, _ in dense)

    def ask(self, wanted: bool) -> None:
        """Let the probes of all weights measure from here, or no longer."""
        for probe in self._probes():
            if wanted:
                probe.ask()
            else:
                probe.dismiss()

    @property
    def asked(self) -> bool:
        """Whether the probes measure."""
        return any(probe.asked for probe in self._probes())

    def _probes(self) -> Iterator[Probe]:
        """Of all weights whose GEMMs are pruned or in FP8."""
        yield from (state.probe for state, _ in self.weights)
        yield from (one.probe for one, _ in self.dense)

    def halved_flops_per_token(self, recomputed: float) -> float:
        """FLOPs a token that the local shards' GEMMs have saved on sparse tensor cores.

        The 2 N K of each such GEMM by a half.

        Args:
            recomputed: share of the layers whose forward, with its output GEMM, is done twice.
        """
        runs = {"output": 1.0 + recomputed}
        return sum(
            weight.numel()
            * state.active_share
            * sum(runs.get(gemm, 1.0) for gemm in state.ran_sparse)
            for state, weight in self.weights
        )

    @property
    def sparse_now(self) -> bool:
        """Whether the clock's step is in a sparse phase."""
        return self.span.recipe.is_sparse

    @property
    def span(self) -> schedule.Span:
        """The phase of the clock's step."""
        step = self.clock.step
        if self._span is None or self._span[0] != step:  # asked for by every layer's pass
            self._span = step, schedule.span_at(self.recipe, step, self.clock.train_iters)
        return self._span[1]

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
        """lambda of the clock's step; where each weight has its own, their mean."""
        if self.recipe.masked_decay_rho is None:
            return self.decay_factor()
        if self.mean_decay is None:  # waits for the device, after a refresh
            own = [state.decay.value for state, _ in self.weights if state.decay is not None]
            values = torch.stack(own).tolist() if own else []
            self.mean_decay = sum(values) / len(values) if values else 0.0
        return self.mean_decay * self.decay_factor()

    def decay_factor(self) -> float:
        """lambda of the clock's step in units of each weight's own (`OwnDecay`)."""
        if self.recipe.masked_decay_rho is not None:
            return float(self.span.recipe.regulariser != "none")
        return schedule.masked_decay(self.recipe, self.clock.step, self.clock.train_iters)

    def kept_momentum(self) -> float:
        """What the clock's step keeps of the momentum at masked entries; 1 but for CAST."""
        if self.recipe.regulariser != "masked_l1_decay":
            return 1.0
        return 1.0 - schedule.decayed_share(self.recipe, self.clock.step, self.clock.train_iters)

    def masked_weights(self) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
        """Parameters with the masks that the clock's step decays them by (bool, like the
        parameter): none in a phase without decay, or where a mask only measures flips."""
        decays = self.span.recipe.regulariser != "none"
        for state, weight in self.weights:
            if state.mask is not None and decays:
                yield weight, state.mask

    def invalidate(self) -> None:
        """Rebuild all operands at their next use."""
        for state, _ in self.weights:
            state.invalidate()
        for one, _ in self.dense:
            one.invalidate()
