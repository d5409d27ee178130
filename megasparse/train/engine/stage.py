"""This rank's stage of a pipeline, with the interface that DeepSpeed's engine asks for.

With a teacher, the teacher's stage runs beside the student's in training: see
`megatron/teacher.py`.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megasparse.config import ResolvedConfig
from megasparse.log import logger
from megasparse.megatron.grid import Grid
from megasparse.megatron.pipeline import (
    LayerPart,
    PartSpec,
    finish_stage,
    part_specs,
    stage_bounds,
    vocab_parallel_loss,
)
from megasparse.megatron.teacher import pair, unpair
from megasparse.sparsity.clock import Clock
from megasparse.train.distillation import Distillation
from megasparse.train.engine.deepspeed import (
    LayerSpec,
    PipelineModule,
    PipeModelDataParallelTopology,
    TiedLayerSpec,
)


class Pipeline(PipelineModule):
    """This rank's stage, with DeepSpeed's interface.

    Args:
        config: of the run.
        grid: this rank's place; DeepSpeed derives the same from the order of its axes.
        padded_vocab_size: as for `build_model`.
        clock: the run's.
        distillation: the teacher's stage beside this one, and its part of the loss, in training.

    Attributes:
        view: the stage as one module with the whole model's parameter names.
        on_forward: called before every forward of the stage.
        on_loss: given the loss of every micro-batch of training; gives what is used instead.
    """

    def __init__(
        self,
        config: ResolvedConfig,
        grid: Grid,
        padded_vocab_size: int,
        clock: Clock,
        distillation: Distillation | None = None,
    ) -> None:
        self._bounds = stage_bounds(config)
        self.distillation = distillation
        self._first, self._last = grid.pp_rank == 0, grid.pp_rank == grid.pp_size - 1
        self.on_forward: Callable[[], None] | None = None
        self.on_loss: Callable[[torch.Tensor], torch.Tensor] | None = None
        topology = PipeModelDataParallelTopology(
            num_pp=grid.pp_size, num_mp=grid.tp_size, num_dp=grid.dp_cp_size
        )
        specs = part_specs(config, grid, padded_vocab_size, clock)
        # DeepSpeed broadcasts tied parameters where they are made; autograd must not see it.
        with quiet(), torch.no_grad():
            super().__init__(
                [_layer_spec(spec) for spec in specs],
                topology=topology,
                loss_fn=self._loss,
            )
        self.parts_here = [*self.tied_modules.values(), *self._numbered()]
        # A tuple, so that its parameters are not registered a second time.
        self._views = (finish_stage(self.parts_here, config, grid),)

    @property
    def view(self) -> torch.nn.Module:
        return self._views[0]

    @property
    def layers(self) -> list[tuple[torch.nn.Module, bool]]:
        """The Transformer layers of the stage, and whether each is recomputed."""
        return [(p.layer, p.recompute) for p in self._numbered() if isinstance(p, LayerPart)]

    def _numbered(self) -> list[torch.nn.Module]:
        return [module for name, module in self.named_children() if name.isdigit()]

    def _partition_layers(self, method: str = "uniform") -> None:
        """Our split instead of DeepSpeed's, which would build every layer to count parameters."""
        self.parts = self._bounds
        stage = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(start=self.parts[stage], stop=self.parts[stage + 1])

    def _loss(self, outputs: Any, labels: Any) -> torch.Tensor:
        if isinstance(outputs, tuple):
            assert self.distillation is not None
            targets, mask = (t.transpose(0, 1).contiguous() for t in labels[:2])
            student, teacher = outputs
            loss = self.distillation.loss(student, teacher, targets, mask, *labels[2:])
        else:
            loss = vocab_parallel_loss(outputs, labels)
        return self.on_loss(loss) if self.training and self.on_loss is not None else loss

    def forward(self, forward_input: Any) -> Any:
        if self.on_forward is not None:
            self.on_forward()
        if self.distillation is None or not self.training:
            return super().forward(forward_input)
        ours, theirs = (forward_input,) * 2 if self._first else unpair(forward_input)
        teacher = self.distillation.teacher.run_stage(theirs)
        return pair(super().forward(ours), teacher, self._last)


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
def quiet() -> Iterator[None]:
    """DeepSpeed prints the split on stdout; it goes to the debug log."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        yield
    logger.debug("%s", text.getvalue())
