"""One optimizer step, whatever the layout: what the plain and the pipeline engine share.

An engine has the model (with the whole model's parameter names), the optimizer, and where the
parameters lie in it. Masked decay enters between clipping and AdamW, or is clipped with the
gradient: the norm is then that of their sum, and the decay is added times the factor that the
gradient was clipped by, in float32 although ZeRO's gradients may be bfloat16.
"""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megasparse.config import ResolvedConfig, gradient_accumulation_steps
from megasparse.distributed.faults import Faults
from megasparse.megatron.grid import Grid
from megasparse.optim.adamw import MaskedAdamW, parameter_groups
from megasparse.optim.lr import learning_rate
from megasparse.optim.masked_decay import MaskedDecay
from megasparse.sparsity.controller import SparsityController
from megasparse.sparsity.wanda import finish_step
from megasparse.train.distillation import Distillation
from megasparse.train.engine import zero
from megasparse.train.engine.step_guard import StepGuard

Batch = dict[str, torch.Tensor]


@dataclass
class StepResult:
    """One optimizer step, over all ranks: mean loss, gradient norm before clipping, rate used.

    Loss and norm are None for a step that was left out.
    """

    loss: float | None
    grad_norm: float | None
    lr: float


class Engine(ABC):
    """DeepSpeed's engine around a model, with masked decay between clipping and AdamW.

    Args:
        config: of the run.
        grid: this rank's place.
        model: this rank's part, sparsified; parameters have the whole model's names.
        controller: the model's sparsity.
        faults: to be injected; none by default.
        tick: told about every micro-batch.

    Attributes:
        fragments: where the parameters lie in the optimizer's tensors.
        guard: watches the steps.
        timer: the controller's; phases of a step are told to it.
        distillation: the teacher and its part of the loss, if there is one.
    """

    distillation: Distillation | None = None

    def __init__(
        self,
        config: ResolvedConfig,
        grid: Grid,
        model: torch.nn.Module,
        controller: SparsityController,
        faults: Faults | None = None,
        tick: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.config, self.grid, self.model, self.controller = config, grid, model, controller
        self.timer = controller.timer
        train = config.train
        recipe = controller.recipe
        decay = MaskedDecay(controller)
        self._decay = decay if recipe.regulariser != "none" else None
        self._on_gradient = decay if recipe.regulariser == "masked_decay" else None
        decoupled = recipe.regulariser == "decoupled_masked_decay"
        self.optimizer = MaskedAdamW(
            parameter_groups(
                model.named_parameters(),
                {id(weight) for _, weight in controller.weights},
                train.weight_decay,
            ),
            before_step=self._before_step,
            decoupled_decay=decay.term if decoupled else None,
            lr=train.lr,
            betas=(train.adam_beta1, train.adam_beta2),
            eps=train.adam_eps,
        )
        together = recipe.masked_decay_before_clipping
        self._measured = decay.with_decay if together else zero.gradient_alone
        self._norm_without_zero: float | None = None
        self._engine = self._start_deepspeed()
        if config.parallel.zero_stage:
            zero.install_norm(self._engine.optimizer, grid, self._measured)
        # Where the parameters lie in the optimizer's tensors, now that ZeRO has made its own.
        self.fragments = (
            zero.partition_fragments(model.named_parameters(), self._engine.optimizer, grid.dp_rank)
            if zero.is_partitioned(self._engine.optimizer)
            else zero.fragments(model.named_parameters(), self.optimizer)
        )
        decay.attach(self.fragments)
        self._faults, self._tick = faults or Faults([], grid.rank), tick
        self.guard = self._make_guard()

    @abstractmethod
    def _start_deepspeed(self) -> Any:
        """The DeepSpeed engine around `self.model` and `self.optimizer`."""

    @abstractmethod
    def _compute_and_update(self, batches: Iterator[Batch]) -> float:
        """All micro-batches of a step and the update; the mean loss over all ranks."""

    @abstractmethod
    def evaluate(
        self,
        batches: Iterator[Batch],
        iterations: int,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> float | None:
        """Mean loss over `iterations` micro-batches of every data-parallel rank.

        Args:
            interrupted: asked again and again, the same answer on all ranks; ends the evaluation
                without a result.
        """

    @abstractmethod
    def logits(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """`(B, S, V)` on every rank, of `(B, S)` int64 tokens that are the same on all."""

    def whole(
        self, parameters: Sequence[torch.nn.Parameter], write: bool = False
    ) -> contextlib.AbstractContextManager[Any]:
        """Within it parameters are whole on this rank: ZeRO 3 gathers them, on all ranks together.

        Args:
            write: what the first data-parallel rank writes into them stays.
        """
        return contextlib.nullcontext()

    def _make_guard(self) -> StepGuard:
        """Before the first step, once DeepSpeed's engine is there."""
        return StepGuard(self.grid, self.model, self._engine.module, self.controller, self._faults)

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches of a rank in an optimizer step."""
        return gradient_accumulation_steps(self.config, self.grid.world)

    def train_step(self, batches: Iterator[Batch]) -> StepResult:
        """Forward, backward and update over one global batch; advances the clock.

        Raises:
            NonFiniteStep: the loss or the gradient norm is not finite; weights, moments, masks and
                generators are as before the step, and so is the clock.
        """
        clock = self.controller.clock
        rate = learning_rate(self.config.train, clock.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.guard.begin()
        loss = self._compute_and_update(batches)
        norm = self._grad_norm()
        self.guard.end(rate, norm)
        self._finish_inputs()
        self.controller.finish_step()
        clock.step += 1
        return StepResult(loss, norm, rate)

    def _finish_inputs(self) -> None:
        """Let all replicas know the inputs of the step (Wanda's masks)."""
        split = self.config.parallel.sequence_parallel
        # A row-parallel layer has channels of its own, and all tokens.
        layers = [
            (state.inputs, split and state.shard.dim == 0)
            for state, _ in self.controller.weights
            if state.inputs is not None
        ]
        finish_step(layers, self.grid.sum_over_dp, self.grid.sum_over_tp)

    def _set_micro_batch(self, number: int) -> None:
        """Tell the layers which micro-batch of the global batch this rank's `number`-th is."""
        self.controller.clock.micro_batch = number * self.grid.dp_size + self.grid.dp_rank

    def _before_step(self, optimizer: torch.optim.Optimizer) -> bool:
        """Runs inside the optimizer, on final gradients: clip without ZeRO, then masked decay."""
        if not self.guard.loss_is_finite:
            return False
        if not self.config.parallel.zero_stage and not self._clip():
            return False
        factor = 1.0
        if self.controller.recipe.masked_decay_before_clipping:
            factor = self._clipped_by()
        if self._decay is not None and self.controller.asked:
            self._decay.measure(optimizer, factor)
        if self._on_gradient is not None:
            self._on_gradient.add_to_gradients(optimizer, factor)
        return True

    def _clipped_by(self) -> float:
        """What the gradients of this step were multiplied by, here or by DeepSpeed; 1: whole."""
        norm, limit = self._norm_without_zero, self.config.train.clip_grad
        if self.config.parallel.zero_stage:
            norm = float(self._engine.optimizer._global_grad_norm)
        assert norm is not None
        return min(1.0, limit / (norm + 1e-6)) if limit else 1.0

    def _clip(self) -> bool:
        """Global norm over the whole model and clipping, for whole (not ZeRO) gradients."""
        gradients = [
            (parameter, parameter.grad)
            for parameter in self.model.parameters()
            if parameter.grad is not None
        ]
        zero.sum_replicated(gradients, self.grid)
        norm = float(zero.global_norm(gradients, self.grid, measured=self._measured))
        self._norm_without_zero = norm
        limit = self.config.train.clip_grad
        if not math.isfinite(norm):
            return False
        if limit and norm > limit:
            for _, gradient in gradients:
                gradient.mul_(limit / (norm + 1e-6))
        return True

    def _grad_norm(self) -> float:
        if not self.config.parallel.zero_stage:
            assert self._norm_without_zero is not None
            return self._norm_without_zero
        if getattr(self._engine.optimizer, "overflow", False):
            return math.nan  # ZeRO 3 left the step out, and keeps the norm of the one before
        return float(self._engine.get_global_grad_norm())
