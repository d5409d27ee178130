"""What an engine asks of its layout: a whole model on every rank, or a stage of a pipeline.

A layout has this rank's part of the model and the DeepSpeed engine around it. It computes
micro-batches; what happens once an optimizer step is in `base.py`.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from megasparse.config import ResolvedConfig, gradient_accumulation_steps
from megasparse.distributed.events import NO_LISTENERS, Events
from megasparse.log import log_once
from megasparse.megatron import balance
from megasparse.megatron.graphs import layer_graphs
from megasparse.megatron.graphs.layer_graphs import LayerGraphs
from megasparse.megatron.grid import Grid
from megasparse.sparsity.controller import SparsityController
from megasparse.sparsity.gradient_sum import StepSums
from megasparse.train.distillation import Distillation
from megasparse.train.engine.gradients import GradientBuffers, one_after_the_other
from megasparse.train.engine.step_guard import Batch, MicroBatch, Poison, StepGuard
from megasparse.train.engine.zero1 import zero1_buffers


class Layout(ABC):
    """This rank's part of the model, and how micro-batches go through it.

    Args:
        config: of the run.
        grid: this rank's place.
        model: this rank's part, sparsified; parameters have the whole model's names.
        controller: the model's sparsity.
        events: called at every point of a step.
        poison: of the guard; none by default.
        distillation: the teacher and its part of the loss, if there is one.

    Attributes:
        guard: checks each step for values that are not finite.
        graphs: of the layers; None: they run eagerly.
        gradients: in which they are added up; None: DeepSpeed's own (ZeRO 2 and 3).
        sums: whether layers add to them by themselves now.
        accumulation_steps: micro-batches of a rank in the optimizer step under way.
    """

    def __init__(
        self,
        config: ResolvedConfig,
        grid: Grid,
        model: torch.nn.Module,
        controller: SparsityController,
        events: Events = NO_LISTENERS,
        poison: Poison | None = None,
        distillation: Distillation | None = None,
    ) -> None:
        self.config, self.grid, self.model, self.controller = config, grid, model, controller
        self.distillation = distillation
        self.accumulation_steps = gradient_accumulation_steps(config, grid.world)
        self.guard = StepGuard(grid, model, controller, poison)
        self.graphs: LayerGraphs | None = None
        self.gradients: GradientBuffers | None = None
        self.sums = StepSums()
        self._added: set[torch.nn.Parameter] = set()  # by the layers themselves
        self._events = events
        self._engine: Any = None

    @abstractmethod
    def start(self, optimizer: torch.optim.Optimizer) -> Any:
        """Make the DeepSpeed engine around the model and its optimizer, once; returns it."""

    def set_batch(self, sequences: int) -> None:
        """Of the step that begins, over all data-parallel ranks; the micro-batch stays."""
        per_step = self.config.train.micro_batch_size * self.grid.dp_size
        if sequences == self.accumulation_steps * per_step:
            return
        self.accumulation_steps = sequences // per_step
        # To DeepSpeed context parallel ranks are data parallel ones, with sequences of their own.
        self._engine.set_train_batch_size(sequences * self.grid.cp_size)
        self._engine.micro_steps = 0  # of which DeepSpeed takes the remainder by the new number

    @abstractmethod
    def compute_and_update(self, batches: Iterator[Batch]) -> float:
        """All micro-batches of a step and the update; the mean loss over all ranks."""

    @abstractmethod
    def compute_again(self, kept: Sequence[MicroBatch]) -> list[str]:
        """A step once more, by all ranks and without an update; what is wrong on this rank.

        Args:
            kept: micro-batches of the step, in order; none on stages between first and last.
        """

    @abstractmethod
    def evaluate(
        self,
        batches: Iterator[Batch],
        iterations: int,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> float | None:
        """Mean loss over `iterations` micro-batches of every data-parallel rank.

        Args:
            interrupted: called again and again, the same answer on all ranks; True ends the
                evaluation without a result.
        """

    @abstractmethod
    def logits(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """`(B, S, V)` on every rank, of `(B, S)` int64 tokens that are the same on all."""

    def take_parts(self) -> dict[str, float]:
        """What the loss is made of, means since the last call; a collective call."""
        return {} if self.distillation is None else self.distillation.take_parts()

    def gathered_parameters(
        self, parameters: Sequence[torch.nn.Parameter], write: bool = False
    ) -> contextlib.AbstractContextManager[Any]:
        """A context in which parameters are whole on this rank; a collective call under ZeRO 3.

        Args:
            write: keep what the first data-parallel rank writes into them.
        """
        return contextlib.nullcontext()

    def _passed(self, point: str, micro_batch: int = 0) -> None:
        """This rank has come to a point of the current step or evaluation."""
        self._events(point, self.controller.clock.step, micro_batch)

    def _make_graphs(
        self, layers: Sequence[tuple[torch.nn.Module, bool]], slots: int | None = None
    ) -> None:
        """CUDA graphs of the layers, unless the run refuses them or cannot have them.

        Args:
            layers: with whether each is recomputed.
            slots: micro-batches of a pipeline that are under way at a time; None: no pipeline.
        """
        if self.config.train.cuda_graph_impl == "none":
            return
        reason = layer_graphs.refusal(self.grid.device, self.config, self._poisoned)
        if reason is None:
            self.graphs = self._graphs(layers, slots or 1)
        elif self.grid.device.type == "cuda":
            log_once("CUDA graphs are not used: %s", reason)

    @property
    def _poisoned(self) -> bool:
        """Whether a test changes gradients in autograd's hands."""
        poison = self.guard.poison
        return poison is not None and bool(poison.poisoned_gradients())

    def _graphs(self, layers: Sequence[tuple[torch.nn.Module, bool]], slots: int) -> LayerGraphs:
        return LayerGraphs(layers, self.controller, self.grid, self._places(), slots)

    @property
    def gradients_stay(self) -> bool:
        """Whether the optimizer finds its gradients at the same addresses in every step."""
        return self.gradients is not None and self.gradients.dtype == torch.float32

    def _places(self) -> dict[torch.nn.Parameter, torch.Tensor] | None:
        """Where gradients are added up; None: each micro-batch's are DeepSpeed's."""
        return None if self.gradients is None else self.gradients.views

    def _make_gradients(self) -> None:
        """Where gradients are added up, once DeepSpeed has put the parameters where they stay."""
        stage, optimizer = self.config.parallel.zero_stage, self._engine.optimizer
        if stage == 1:
            full = self.config.parallel.accumulate_allreduce_grads_in_fp32
            dtype = torch.float32 if full else next(self.model.parameters()).dtype
            self.gradients = zero1_buffers(optimizer, dtype)
        elif stage == 0:
            groups = [group["params"] for group in optimizer.param_groups]
            self.gradients = one_after_the_other(groups, torch.float32)
        if self.gradients is not None and not self._poisoned:
            self._added = self.controller.add_up_in(self.gradients.views, self.sums)

    def _begin_gradients(self) -> None:
        balance.begin_step(self.accumulation_steps, self.grid.cp_size)
        if self.gradients is not None:
            self.gradients.begin_step()

    @contextlib.contextmanager
    def adding_up(self) -> Iterator[None]:
        """Within it layers add up the gradients of their weights by themselves."""
        self.sums.open = True
        try:
            yield
        finally:
            self.sums.open = False

    def close(self) -> None:
        """At the end of a run: communicators cannot be left while graphs refer to them."""
        if self.graphs is not None:
            self.graphs.close()

    def end_step(self) -> None:
        """After a step that was accepted."""
        if self.graphs is not None:
            self.graphs.end_step()

    def _number(self, number: int) -> int:
        """This rank's `number`-th micro-batch of a step, in the global batch."""
        return number * self.grid.dp_size + self.grid.dp_rank

    def _set_micro_batch(self, number: int) -> None:
        """Set the layers' clock to this rank's `number`-th micro-batch of the global batch."""
        self.controller.clock.micro_batch = self._number(number)
