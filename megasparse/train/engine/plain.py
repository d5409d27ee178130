"""The engine without a pipeline: every rank has all layers (or a tensor-parallel share of each)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from megasparse.config import ResolvedConfig
from megasparse.config.deepspeed import deepspeed_config
from megasparse.distributed.faults import Faults
from megasparse.log import speaks
from megasparse.megatron.grid import Grid, ModelParallelUnit
from megasparse.megatron.loss import masked_mean
from megasparse.progress import progress
from megasparse.sparsity.controller import SparsityController
from megasparse.train.distillation import Distillation
from megasparse.train.engine.base import Batch, Engine
from megasparse.train.engine.deepspeed import deepspeed


class LanguageModelLoss(torch.nn.Module):
    """The model with its loss: the mean over the tokens that count.

    A batch is what `train.data.batches` yields.

    Args:
        model: the student, if there is a teacher.
        distillation: the teacher and its part of the loss in training.
    """

    def __init__(self, model: torch.nn.Module, distillation: Distillation | None = None) -> None:
        super().__init__()
        self.model = model
        self._distillation = distillation

    def forward(self, batch: Batch) -> torch.Tensor:
        """0-d float32: mean cross entropy over the tokens with loss_mask 1, or what a teacher's
        student minimises; logits `(B, S, V)` of a batch without labels."""
        if "labels" not in batch:
            return self.model(
                batch["tokens"], batch["position_ids"], None, runtime_gather_output=True
            )
        if self._distillation is not None and self.training:
            inputs = batch["tokens"], batch["position_ids"], batch.get("attention_mask")
            teacher = self._distillation.teacher.logits(*inputs)
            student = self.model(*inputs)
            return self._distillation.loss(student, teacher, batch["labels"], batch["loss_mask"])
        losses = self.model(
            batch["tokens"],
            batch["position_ids"],
            batch.get("attention_mask"),
            labels=batch["labels"],
        )
        return masked_mean(losses, batch["loss_mask"])


class PlainEngine(Engine):
    """Micro-batch after micro-batch through the whole model. Args: see `Engine`."""

    def __init__(
        self,
        config: ResolvedConfig,
        grid: Grid,
        model: torch.nn.Module,
        controller: SparsityController,
        faults: Faults | None = None,
        tick: Callable[[str], None] = lambda _: None,
        distillation: Distillation | None = None,
    ) -> None:
        self.distillation = distillation
        super().__init__(config, grid, model, controller, faults, tick)

    def _start_deepspeed(self) -> Any:
        engine, *_ = deepspeed.initialize(
            model=LanguageModelLoss(self.model, self.distillation),
            optimizer=self.optimizer,
            config=deepspeed_config(self.config, self.grid.world),
            mpu=ModelParallelUnit(),
            dist_init_required=False,
        )
        return engine

    def whole(
        self, parameters: Sequence[torch.nn.Parameter], write: bool = False
    ) -> contextlib.AbstractContextManager[Any]:
        return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if write else None)

    def _compute_and_update(self, batches: Iterator[Batch]) -> float:
        self._engine.train()
        total = torch.zeros((), device=self.grid.device)
        for number in range(self.accumulation_steps):
            self._tick(f"step {self.controller.clock.step + 1}, micro-batch {number}")
            self._set_micro_batch(number)
            self._faults.at("data")
            batch = self.guard.keep(next(batches), self.controller.clock.micro_batch)
            self._faults.at("forward")
            with self.timer.span("forward"):
                loss = self.guard.poisoned(self._engine(batch))
            total += loss.detach()
            self._faults.at("backward")
            with self.timer.span("backward"):
                self._engine.backward(loss)
            if number == self.accumulation_steps - 1:
                self.guard.check_loss(total)
                self._faults.at("optimizer")
            with self.timer.span("optimizer"):
                self._engine.step()
        return float(self.grid.mean_over_dp(total / self.accumulation_steps))

    @torch.no_grad()
    def evaluate(
        self,
        batches: Iterator[Batch],
        iterations: int,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> float | None:
        self._engine.eval()
        self._faults.step = self.controller.clock.step
        total = torch.zeros((), device=self.grid.device)
        for number in progress(
            range(iterations), desc="evaluation", unit="batch", enabled=speaks()
        ):
            self._tick(f"evaluation, micro-batch {number}")
            self._faults.at("evaluate")
            if interrupted():
                return None
            total += self._engine(next(batches))
        return float(self.grid.mean_over_dp(total / iterations))

    @torch.no_grad()
    def logits(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        self._engine.eval()
        return self._engine({"tokens": tokens, "position_ids": positions})
