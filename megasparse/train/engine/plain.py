"""The layout without a pipeline: every rank has all layers (or a tensor-parallel share of each)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from megasparse.config.deepspeed.derived import deepspeed_config
from megasparse.log import is_logging_rank
from megasparse.megatron.bert import Bert
from megasparse.megatron.blocks.packing import packed
from megasparse.megatron.context.batch import DIVISOR, whole_logits
from megasparse.megatron.graphs.captured import let_replays_recompute
from megasparse.megatron.loss import masked_mean
from megasparse.megatron.model_parallel_unit import ModelParallelUnit
from megasparse.megatron.pipeline import recomputed_layers
from megasparse.progress import progress
from megasparse.train.distillation import Distillation
from megasparse.train.engine.bert_loss import BertLoss
from megasparse.train.engine.deepspeed import deepspeed
from megasparse.train.engine.experts import tell_of_experts
from megasparse.train.engine.layout import Layout
from megasparse.train.engine.step_guard import Batch, MicroBatch, samples_of


class LanguageModelLoss(torch.nn.Module):
    """The model with its loss: the mean over the tokens that count.

    A batch is what `megatron.data.batches.batches` yields.

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
            taken = batch["tokens"], batch["position_ids"], batch.get("attention_mask")
            teacher = self._distillation.teacher.logits(*taken)
            student = self.model(*taken)
            return self._distillation.loss(
                student, teacher, batch["labels"], batch["loss_mask"], batch.get(DIVISOR)
            )
        inputs, lengths = packed(batch)
        more = {} if lengths is None else {"packed_seq_params": lengths}
        losses = self.model(
            inputs["tokens"],
            inputs["position_ids"],
            inputs.get("attention_mask"),
            labels=inputs["labels"],
            **more,
        )
        return masked_mean(losses, inputs["loss_mask"], batch.get(DIVISOR))


class PlainLayout(Layout):
    """Micro-batch after micro-batch through the whole model."""

    _ahead: tuple[Iterator[Batch], Batch] | None = None
    _loss: LanguageModelLoss | BertLoss

    def start(self, optimizer: torch.optim.Optimizer) -> Any:
        block: Any = getattr(self.model, self.config.model.block)
        if self.config.parallel.zero_stage == 3 and self.controller.fp8 is not None:
            # What is fused reaches over modules, so their weights have to be there together; and
            # hooks of ZeRO 3 on each of them would look like someone's who wants its input.
            for layer in block.layers:
                deepspeed.utils.set_z3_leaf_module(layer, True)
                layer.register_forward_pre_hook(_hidden_state_first, with_kwargs=True)
        self._loss = (
            BertLoss(self.model, self.grid)
            if isinstance(self.model, Bert)
            else LanguageModelLoss(self.model, self.distillation)
        )
        tell_of_experts(self._loss, self.grid)
        self._engine, *_ = deepspeed.initialize(
            model=self._loss,
            optimizer=optimizer,
            config=deepspeed_config(self.config, self.grid.world),
            mpu=ModelParallelUnit(),
            dist_init_required=False,
        )
        # After DeepSpeed has put the parameters where they stay.
        self._make_gradients()
        if self.gradients is not None and self._added:
            self.sums.begins = torch.ones(1, dtype=torch.int64, device=self.grid.device)
            self.gradients.leave(self._added)
        let_replays_recompute(block)
        recomputed = recomputed_layers(self.config)
        self._make_graphs([(layer, n in recomputed) for n, layer in enumerate(block.layers)])
        return self._engine

    def take_parts(self) -> dict[str, float]:
        return self._loss.take_parts() if isinstance(self._loss, BertLoss) else super().take_parts()

    def gathered_parameters(
        self, parameters: Sequence[torch.nn.Parameter], write: bool = False
    ) -> contextlib.AbstractContextManager[Any]:
        return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if write else None)

    def compute_and_update(self, batches: Iterator[Batch]) -> float:
        # DeepSpeed changes the mode of the module, not its own. It walks over all modules, while a
        # GPU has nothing to do.
        if not self._engine.module.training:
            self._engine.train()
        total = torch.zeros((), device=self.grid.device)
        self._begin_gradients()
        if self.graphs is not None:
            self.graphs.begin_step([self._number(n) for n in range(self.accumulation_steps)])
        for number in range(self.accumulation_steps):
            self._passed("micro_batch", number)
            self._set_micro_batch(number)
            if self.sums.begins is not None and number < 2:
                self.sums.begins.fill_(number == 0)
            if self.graphs is not None:
                self.graphs.begin_micro_batch(number)
            self._passed("data", number)
            batch = self.guard.keep(self._next(batches), self.controller.clock.micro_batch)
            self._passed("forward", number)
            with self.controller.timer.span("forward"):
                loss = self.guard.poisoned(self._engine(batch))
            total += loss.detach()
            self._passed("backward", number)
            with self.controller.timer.span("backward"):
                self._engine.backward(loss)
            if number == self.accumulation_steps - 1:
                self._look_ahead(batches)
                self.guard.check_loss(total / self.accumulation_steps)
                self._passed("optimizer", number)
            with self.controller.timer.span("optimizer"):
                self._engine.step()
        return self.guard.loss

    def _next(self, batches: Iterator[Batch]) -> Batch:
        ahead, self._ahead = self._ahead, None
        return ahead[1] if ahead is not None and ahead[0] is batches else next(batches)

    def _look_ahead(self, batches: Iterator[Batch]) -> None:
        """Fetch the next step's first micro-batch while a GPU computes this one's last: behind the
        update, which is waited for, it would have nothing to do."""
        if self.grid.device.type == "cuda":
            with contextlib.suppress(StopIteration):
                self._ahead = batches, next(batches)

    def compute_again(self, kept: Sequence[MicroBatch]) -> list[str]:
        if self.graphs is not None:
            self.graphs.let_go()  # gradients of each parameter are wanted
        findings: list[str] = []
        named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        for local, micro_batch in enumerate(kept):
            self.controller.clock.micro_batch = micro_batch.number
            if self.graphs is not None:
                self.graphs.begin_micro_batch(local)
            loss = self.guard.poisoned(self._engine.module(micro_batch.batch))
            gradients = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
            samples = samples_of(micro_batch.batch)
            where = f"rank {self.grid.rank}, micro-batch {local}, {samples}"
            if not bool(torch.isfinite(loss)):
                findings.append(f"the loss is {float(loss.detach())} on {where}")
            findings += [
                f"the gradient of {name} is not finite on {where}"
                for (name, _), g in zip(named, gradients, strict=True)
                if g is not None and not bool(torch.isfinite(g.float().square().sum()))
            ]
        return findings

    @torch.no_grad()
    def evaluate(
        self,
        batches: Iterator[Batch],
        iterations: int,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> float | None:
        self._engine.eval()
        total = torch.zeros((), device=self.grid.device)
        for number in progress(
            range(iterations),
            desc="evaluation",
            unit="batch",
            enabled=is_logging_rank(),
            leave=False,
        ):
            self._passed("evaluate", number)
            if interrupted():
                return None
            total += self._engine(next(batches))
        return float(self.grid.mean_over_dp_cp(total / iterations))

    @torch.no_grad()
    def logits(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        self._engine.eval()
        return whole_logits(
            lambda *own: self._engine(dict(zip(("tokens", "position_ids"), own, strict=True))),
            tokens,
            positions,
            self.grid,
        )


def _hidden_state_first(
    _: torch.nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A layer's hidden state as a positional argument: of those alone torch knows when their
    gradients are there, which is when ZeRO 3 lets go of the layer's weights."""
    if "hidden_states" in named:
        arguments = (named["hidden_states"], *arguments)
    return arguments, {k: v for k, v in named.items() if k != "hidden_states"}
