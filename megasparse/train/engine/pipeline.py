"""The layout with a pipeline: DeepSpeed's PipelineModule and its 1F1B schedule.

The parts come from `megatron/pipeline.py`; here they become DeepSpeed's layer specs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megasparse.config import ResolvedConfig
from megasparse.config.deepspeed.derived import deepspeed_config
from megasparse.distributed.events import NO_LISTENERS, Events
from megasparse.log import is_logging_rank
from megasparse.megatron.context.batch import DIVISOR, whole_logits
from megasparse.megatron.grid import Grid
from megasparse.megatron.pipeline import gather_logits
from megasparse.progress import progress
from megasparse.sparsity.controller import SparsityController
from megasparse.train.engine.deepspeed import deepspeed, schedule
from megasparse.train.engine.experts import tell_of_experts
from megasparse.train.engine.layout import Layout
from megasparse.train.engine.stage import Pipeline, quiet
from megasparse.train.engine.step_guard import Batch, MicroBatch, Poison, samples_of

# Of DeepSpeed's instructions; what sends, receives and reduces is communication by itself.
PHASES = {
    schedule.LoadMicroBatch: "data",
    schedule.ForwardPass: "forward",
    schedule.BackwardPass: "backward",
    schedule.OptimizerStep: "optimizer",
}


class PipelineLayout(Layout):
    """Micro-batches through the stages, one forward one backward.

    Args:
        config: of the run.
        grid: this rank's place.
        pipeline: this rank's stage, sparsified; not the model, which is the stage's view.
        controller: the stage's sparsity.
        events: called at every point of a step.
        poison: of the guard; none by default.
    """

    def __init__(
        self,
        config: ResolvedConfig,
        grid: Grid,
        pipeline: Pipeline,
        controller: SparsityController,
        events: Events = NO_LISTENERS,
        poison: Poison | None = None,
    ) -> None:
        super().__init__(
            config, grid, pipeline.view, controller, events, poison, pipeline.distillation
        )
        self._pipeline = pipeline
        self._forwards = self._backwards = 0
        # Of a bad step that is computed again: what is found, and its micro-batches.
        self._findings: list[str] | None = None
        self._again: list[Batch] = []
        pipeline.on_forward, pipeline.on_loss = self._count_forward, self._on_loss

    def start(self, optimizer: torch.optim.Optimizer) -> Any:
        tell_of_experts(self._pipeline, self.grid)
        with quiet():
            engine, *_ = deepspeed.initialize(
                model=self._pipeline,
                optimizer=optimizer,
                config=deepspeed_config(self.config, self.grid.world),
                dist_init_required=False,
            )
        # The schedule is DeepSpeed's: what has to happen in between goes before its instructions.
        hooks = {
            schedule.LoadMicroBatch: self._before_load,  # first and last stage only
            schedule.ForwardPass: self._before_forward,
            schedule.BackwardPass: self._before_backward,
            schedule.OptimizerStep: self._before_optimizer,
        }
        engine._INSTRUCTION_MAP = {
            kind: self._instruction(hooks.get(kind), PHASES.get(kind, "other"), run)
            for kind, run in engine._INSTRUCTION_MAP.items()
        }
        self._engine = engine
        self._make_gradients()
        slots = schedule.TrainSchedule(
            self.accumulation_steps, self.grid.pp_size, self.grid.pp_rank
        ).num_pipe_buffers()
        self._make_graphs(self._pipeline.layers, slots)
        return engine

    def _instruction(
        self, hook: Callable[[], None] | None, phase: str, run: Callable[..., Any]
    ) -> Callable[..., Any]:
        """An instruction of DeepSpeed's schedule, timed, after a hook."""

        def instruction(engine: Any, **options: Any) -> Any:
            if hook is not None:
                hook()
            with self.controller.timer.span(phase):
                return run(engine, **options)

        return instruction

    def _count_forward(self) -> None:
        """Forwards of a stage are in order of the micro-batches, whatever is between them."""
        self._set_micro_batch(self._forwards)
        if self.graphs is not None and self._pipeline.training:
            self.graphs.begin_micro_batch(self._forwards)
        self._forwards += 1

    def _before_load(self) -> None:
        if self._pipeline.training:
            self._passed("data")

    def _before_forward(self) -> None:
        if self._pipeline.training:
            self._passed("micro_batch", self._forwards)
            self._passed("forward", self._forwards)
        else:
            self._passed("evaluate", self._forwards)

    def _before_backward(self) -> None:
        self._passed("backward", self._backwards)
        self._backwards += 1

    def _before_optimizer(self) -> None:
        """Once a step on every rank, when all gradients are there."""
        total = self._engine.total_loss  # None but on the last stage
        self.guard.check_loss(
            torch.zeros((), device=self.grid.device) if total is None else total.detach()
        )
        if self._findings is not None:
            self.guard.refuse_update()  # a step computed again updates nothing
        self._passed("optimizer")

    def _on_loss(self, loss: torch.Tensor) -> torch.Tensor:
        loss = self.guard.poisoned(loss)
        if self._findings is not None and not bool(torch.isfinite(loss)):
            where = self._where(self._forwards - 1)
            self._findings.append(f"the loss is {float(loss.detach())} on {where}")
        return loss

    def compute_and_update(self, batches: Iterator[Batch]) -> float:
        def kept() -> Iterator[Batch]:
            for number, batch in enumerate(batches):
                yield self.guard.keep(batch, number * self.grid.dp_size + self.grid.dp_rank)

        if self.graphs is not None:
            self.graphs.begin_step([self._number(n) for n in range(self.accumulation_steps)])
        return self._train_batch(kept())

    def _train_batch(self, batches: Iterator[Batch]) -> float:
        self._forwards = self._backwards = 0
        self._begin_gradients()
        loss = float(self._engine.train_batch(_pairs(batches)))
        self._release()
        return loss

    def compute_again(self, kept: Sequence[MicroBatch]) -> list[str]:
        self._findings, self._again = [], [one.batch for one in kept]
        if self.graphs is not None:
            self.graphs.let_go()  # gradients of each parameter are wanted
        handles = [
            parameter.register_hook(functools.partial(self._on_gradient_again, name))
            for name, parameter in self.model.named_parameters()
        ]
        try:
            self._train_batch(iter(self._again))
            return list(dict.fromkeys(self._findings))
        finally:
            self._findings, self._again = None, []
            for handle in handles:
                handle.remove()

    def _on_gradient_again(self, name: str, gradient: torch.Tensor) -> None:
        if self._findings is not None and not bool(torch.isfinite(gradient.float().square().sum())):
            where = self._where(self._backwards - 1)
            self._findings.append(f"the gradient of {name} is not finite on {where}")

    def _where(self, micro_batch: int) -> str:
        known = micro_batch < len(self._again)
        samples = samples_of(self._again[micro_batch]) if known else "samples unknown"
        return f"rank {self.grid.rank}, micro-batch {micro_batch}, {samples}"

    def _release(self) -> None:
        """Let go of what DeepSpeed keeps until the next step: the last stage's logits and graph."""
        self._engine.loss = self._engine.loss.detach()
        for kept in self._engine.pipe_buffers.values():
            kept[:] = [None] * len(kept)

    def evaluate(
        self,
        batches: Iterator[Batch],
        iterations: int,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> float | None:
        # As many at a time as in a step: DeepSpeed's schedule cannot be left in the middle.
        pairs, total, done = _pairs(batches), 0.0, 0
        self._forwards = 0
        self._forget_shapes()
        with progress(
            desc="evaluation",
            total=iterations,
            unit="batch",
            enabled=is_logging_rank(),
            leave=False,
        ) as bar:
            while done < iterations:
                if interrupted():
                    return None
                count = min(self.accumulation_steps, iterations - done)
                total += count * float(self._engine.eval_batch(pairs, num_micro_batches=count))
                done += count
                bar.update(count)
        self._forget_shapes()
        return total / iterations

    def _forget_shapes(self) -> None:
        """Evaluations have no teacher: what travels between stages is not what it is in training,
        and DeepSpeed sends its shape to the next stage once."""
        if self.distillation is not None:
            self._engine.reset_activation_shape()

    @torch.no_grad()
    def logits(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Stage after stage; each hands its output to all, which is slow and simple."""
        self._pipeline.eval()
        return whole_logits(self._own_logits, tokens, positions, self.grid)

    def _own_logits(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """`(B, S, V)` of this rank's tokens."""
        grid = self.grid
        value = torch.empty(0)
        ranks = dist.get_process_group_ranks(grid.pp_group)
        for stage, source in enumerate(ranks):
            mine = stage == grid.pp_rank
            if mine:
                inputs = (tokens, positions) if stage == 0 else value
                value = self._pipeline(inputs)
                if stage == grid.pp_size - 1:
                    value = gather_logits(value)
                value = value.contiguous()
            described = [(value.shape, value.dtype)] if mine else [None]
            dist.broadcast_object_list(described, src=source, group=grid.pp_group)
            if not mine:
                shape, dtype = described[0]  # type: ignore[misc]
                value = torch.empty(shape, dtype=dtype, device=grid.device)
            dist.broadcast(value, src=source, group=grid.pp_group)
        return value


def _pairs(batches: Iterator[Batch]) -> Iterator[tuple[Any, Any]]:
    """Batches as DeepSpeed's pipeline takes them: (inputs of the first stage, of the loss)."""
    for batch in batches:
        inputs = [batch["tokens"], batch["position_ids"]]
        if "attention_mask" in batch:
            inputs.append(batch["attention_mask"])
        wanted = (batch["labels"], batch["loss_mask"])
        yield tuple(inputs), (*wanted, batch[DIVISOR]) if DIVISOR in batch else wanted
