"""One optimizer step, whatever the layout.

An engine has a layout (this rank's part of the model, see `layout.py`), the optimizer, and where
the parameters lie in it. Masked decay enters between clipping and AdamW, or is clipped with the
gradient: the norm is then that of their sum, and the decay is added times the factor that the
gradient was clipped by, in float32 although ZeRO's gradients may be bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megasparse.config import ResolvedConfig
from megasparse.config.batches import batch_size
from megasparse.config.shapes import OUTPUT_LAYER, WORD_EMBEDDINGS
from megasparse.megatron.grid import Grid
from megasparse.optim.adamw import MaskedAdamW, parameter_groups
from megasparse.optim.decay_rule import DecayRule
from megasparse.optim.lr import decoupled, learning_rate
from megasparse.optim.masked_decay import MaskedDecay
from megasparse.sparsity.controller import SparsityController
from megasparse.sparsity.wanda import finish_step
from megasparse.train.engine import zero
from megasparse.train.engine.layout import Layout
from megasparse.train.engine.step_guard import Batch
from megasparse.train.engine.zero1 import Zero1

# What `--decoupled-lr` is the learning rate of.
ENDS = (f"{WORD_EMBEDDINGS}.weight", f"{OUTPUT_LAYER}.weight")


@dataclass
class StepResult:
    """One optimizer step, over all ranks: mean loss, gradient norm before clipping, learning rate.

    Loss and norm are None for a skipped step.
    """

    loss: float | None
    grad_norm: float | None
    lr: float


# Decays that join the momentum instead of the gradient.
DECOUPLED = ("decoupled_masked_decay", "masked_l1_decay")


class Engine:
    """DeepSpeed's engine around a model, with masked decay between clipping and AdamW.

    Args:
        config: of the run.
        grid: this rank's place.
        layout: this rank's part of the model, not started yet.
        controller: the model's sparsity.

    Attributes:
        model: the layout's, with the whole model's parameter names.
        fragments: where the parameters lie in the optimizer's tensors.
        timer: the controller's, of the phases of a step.
    """

    def __init__(
        self, config: ResolvedConfig, grid: Grid, layout: Layout, controller: SparsityController
    ) -> None:
        self.config, self.grid, self.layout, self.controller = config, grid, layout, controller
        self.model = model = layout.model
        self.timer = controller.timer
        train = config.train
        recipes = [phase.recipe for phase in controller.recipe.phases]
        decay = MaskedDecay(controller)
        self._decay = decay if any(one.regulariser != "none" for one in recipes) else None
        self.optimizer = MaskedAdamW(
            parameter_groups(
                model.named_parameters(),
                {id(weight) for _, weight in controller.weights},
                train.weight_decay,
                ENDS if train.decoupled_lr is not None else (),
            ),
            before_step=self._before_step,
            pieces=None if self._decay is None else decay.pieces,
            of_sign=any(one.regulariser == "masked_l1_decay" for one in recipes),
            lr=train.lr,
            betas=(train.adam_beta1, train.adam_beta2),
            eps=train.adam_eps,
        )
        together = any(one.masked_decay_before_clipping for one in recipes)
        self._measured = decay.with_decay if together else zero.gradient_alone
        self._norm_without_zero: float | None = None
        self._engine = layout.start(self.optimizer)
        self._rule: DecayRule | None = None
        zero1 = None
        if config.parallel.zero_stage == 1:
            assert layout.gradients is not None
            zero1 = Zero1(
                self._engine.optimizer,
                layout.gradients,
                grid,
                train.clip_grad,
                self._measured,
                layout.guard,
            )
        elif config.parallel.zero_stage:
            zero.install_norm(self._engine.optimizer, grid, self._measured)
        # Where the parameters lie in the optimizer's tensors, now that ZeRO has made its own.
        self.fragments = (
            zero.partition_fragments(
                model.named_parameters(), self._engine.optimizer, grid.dp_cp_rank
            )
            if zero.is_partitioned(self._engine.optimizer)
            else zero.fragments(model.named_parameters(), self.optimizer)
        )
        decay.attach(self.fragments)
        if controller.recipe.masked_decay_rho is not None:
            self._rule = DecayRule(controller, decay, self.optimizer, self._over_holders)
        if zero1 is not None:
            zero1.fragments = self.fragments
        if layout.graphs is not None and layout.gradients_stay:
            self.optimizer.run = layout.graphs.update

    def train_step(self, batches: Iterator[Batch]) -> StepResult:
        """Forward, backward and update over one global batch; advances the clock.

        Raises:
            NonFiniteStep: the loss or the gradient norm is not finite; weights, moments, masks and
                generators are as before the step, and so is the clock.
        """
        clock = self.controller.clock
        clock.batch = batch_size(self.config.train, clock.samples)
        self.layout.set_batch(clock.batch)
        lr = learning_rate(self.config.train, clock.step, clock.samples)
        lr_of_ends = learning_rate(decoupled(self.config.train), clock.step, clock.samples)
        for group in self.optimizer.param_groups:
            group["lr"] = lr_of_ends if group["name"] == "ends" else lr
        guard = self.layout.guard
        guard.begin()
        with self.layout.adding_up():
            loss = self.layout.compute_and_update(batches)
        norm = self._grad_norm()
        guard.end(lr, norm, self.layout.compute_again)
        self._finish_inputs()
        self.controller.finish_step()
        self.layout.end_step()
        clock.advance()
        if self._rule is not None:
            self._rule.follow()
        return StepResult(loss, norm, lr)

    def _over_holders(self, sums: torch.Tensor) -> torch.Tensor:
        """Sums over the pieces of the same weights: of shards, and of ZeRO's parts of them."""
        if self.config.parallel.zero_stage:
            self.grid.sum_over_dp_cp(sums)
        return self.grid.sum_over_tp(sums)

    def calibrate(self, batches: Iterator[Batch], iterations: int) -> None:
        """Observe what the dense weights' linears see (for Wanda's first masks); collective.

        Args:
            batches: micro-batches of this rank; `iterations`: how many.
        """
        self.controller.calibrating = True
        try:
            self.layout.evaluate(batches, iterations)
        finally:
            self.controller.calibrating = False
        self._finish_inputs()

    def _finish_inputs(self) -> None:
        """Add up the input norms of the step over all replicas (for Wanda's masks)."""
        split = self.config.parallel.sequence_parallel
        # A row-parallel layer has channels of its own, and all tokens.
        layers = [
            (state.inputs, split and state.shard.dim == 0)
            for state, _ in self.controller.weights
            if state.inputs is not None
        ]
        finish_step(layers, self.grid.sum_over_dp_cp, self.grid.sum_over_tp)

    def _before_step(self, _: torch.optim.Optimizer) -> bool:
        """Runs inside the optimizer, on final gradients: clipping without ZeRO, masked decay."""
        if not self.config.parallel.zero_stage and not self._clip():
            return False
        on_device = isinstance(self.optimizer.clip, torch.Tensor)  # which knows when not to update
        if not on_device and not self.layout.guard.loss_is_finite:
            return False
        if self._decay is not None:
            optimizer, strength = self.optimizer, self.controller.decay_factor()
            recipe = self.controller.span.recipe
            optimizer.decay = strength
            optimizer.kept = self.controller.kept_momentum()
            optimizer.decoupled = recipe.regulariser in DECOUPLED
            if recipe.masked_decay_before_clipping:
                optimizer.decay = self._clipped_by() * strength
            if self.controller.asked and (clip := float(optimizer.clip)) > 0:
                self._decay.measure(optimizer, float(optimizer.decay) / clip)
        return True

    def _clipped_by(self) -> float | torch.Tensor:
        """What the gradients of this step were multiplied by, here or by DeepSpeed; 1: whole."""
        if isinstance(self.optimizer.clip, torch.Tensor):
            return self.optimizer.clip
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
        (norm,) = self.layout.guard.read(
            zero.global_norm(gradients, self.grid, measured=self._measured)
        )
        self._norm_without_zero = norm
        limit = self.config.train.clip_grad
        if not math.isfinite(norm):
            return False
        self.optimizer.clip = limit / (norm + 1e-6) if limit and norm > limit else 1.0
        return True

    def _grad_norm(self) -> float:
        if not self.config.parallel.zero_stage:
            assert self._norm_without_zero is not None
            return self._norm_without_zero
        if getattr(self._engine.optimizer, "overflow", False):
            return math.nan  # ZeRO 3 skipped the step, and keeps the norm of the one before
        return float(self._engine.get_global_grad_norm())
