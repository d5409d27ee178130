"""The engine with a pipeline: DeepSpeed's PipelineModule and its 1F1B schedule.

The parts come from `megatron/pipeline.py`; here they become DeepSpeed's layer specs.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from megasparse.config import RunConfig
from megasparse.log import logger
from megasparse.megatron.grid import Grid
from megasparse.megatron.pipeline import (
    PartSpec,
    finish_stage,
    gather_logits,
    part_specs,
    stage_bounds,
    vocab_parallel_loss,
)
from megasparse.sparsity.controller import Clock, SparsityController
from megasparse.train.engine import Batch, Engine
from megasparse.train.faults import Faults
from megasparse.train.process import (
    LayerSpec,
    PipelineModule,
    PipeModelDataParallelTopology,
    TiedLayerSpec,
    deepspeed,
    deepspeed_config,
)


class Pipeline(PipelineModule):
    """This rank's stage, with DeepSpeed's interface.

    Args:
        config: resolved.
        grid: this rank's place; DeepSpeed derives the same from the order of its axes.
        padded_vocab_size: as for `build_model`.
        clock: the run's.

    Attributes:
        view: the stage as one module with the whole model's parameter names.
        on_forward: called before every forward of the stage.
    """

    def __init__(self, config: RunConfig, grid: Grid, padded_vocab_size: int, clock: Clock) -> None:
        self._bounds = stage_bounds(config)
        self.on_forward: Callable[[], None] | None = None
        topology = PipeModelDataParallelTopology(
            num_pp=grid.pp_size, num_mp=grid.tp_size, num_dp=grid.dp_size
        )
        specs = part_specs(config, grid, padded_vocab_size, clock)
        # DeepSpeed broadcasts tied parameters where they are made; autograd must not see it.
        with _quiet(), torch.no_grad():
            super().__init__(
                [_layer_spec(spec) for spec in specs],
                topology=topology,
                loss_fn=vocab_parallel_loss,
            )
        self.parts_here = [*self.tied_modules.values(), *self._numbered()]
        # A tuple, so that its parameters are not registered a second time.
        self._views = (finish_stage(self.parts_here, config, grid),)

    @property
    def view(self) -> torch.nn.Module:
        return self._views[0]

    def _numbered(self) -> list[torch.nn.Module]:
        return [module for name, module in self.named_children() if name.isdigit()]

    def _partition_layers(self, method: str = "uniform") -> None:
        """Our split instead of DeepSpeed's, which would build every layer to count parameters."""
        self.parts = self._bounds
        stage = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(start=self.parts[stage], stop=self.parts[stage + 1])

    def forward(self, forward_input: Any) -> Any:
        if self.on_forward is not None:
            self.on_forward()
        return super().forward(forward_input)


class PipelineEngine(Engine):
    """Micro-batches through the stages, one forward one backward.

    Args: see `Engine`; `pipeline` instead of the model.
    """

    def __init__(
        self,
        config: RunConfig,
        grid: Grid,
        pipeline: Pipeline,
        controller: SparsityController,
        faults: Faults | None = None,
        tick: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._pipeline = pipeline
        self._forwards = 0
        super().__init__(config, grid, pipeline.view, controller, faults, tick)
        pipeline.on_forward = self._count_forward

    def _start_deepspeed(self) -> Any:
        with _quiet():
            engine, *_ = deepspeed.initialize(
                model=self._pipeline,
                optimizer=self.optimizer,
                config=deepspeed_config(self.config, self.grid.world),
                dist_init_required=False,
            )
        return engine

    def _count_forward(self) -> None:
        """Forwards of a stage are in order of the micro-batches, whatever is between them."""
        self._faults.at("forward")
        self._set_micro_batch(self._forwards)
        self._forwards += 1

    def _loss_module(self) -> torch.nn.Module | None:
        return None  # no rank can compute a loss by itself

    def _compute_and_update(self, batches: Iterator[Batch]) -> float:
        self._forwards = 0
        self._faults.at("data")
        loss = float(self._engine.train_batch(_pairs(batches)))
        self._faults.at("optimizer")
        self._release()
        return loss

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
        self._forwards = 0
        self._faults.step = self.controller.clock.step
        self._faults.at("evaluate")
        if interrupted():  # once: DeepSpeed computes the rest in one go
            return None
        return float(self._engine.eval_batch(_pairs(batches), num_micro_batches=iterations))

    @torch.no_grad()
    def logits(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Stage after stage; each hands its output to all, which is slow and simple."""
        self._pipeline.eval()
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
        yield tuple(inputs), (batch["labels"], batch["loss_mask"])


def _layer_spec(spec: PartSpec) -> LayerSpec:
    if spec.tied is None:
        return LayerSpec(spec.kind, **spec.options)
    return TiedLayerSpec(
        spec.tied,
        spec.kind,
        forward_fn=spec.forward,
        tied_weight_attr=spec.tied_weight,
        **spec.options,
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """DeepSpeed prints the split on stdout; it goes to the debug log."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        yield
    logger.debug("%s", text.getvalue())
