"""A frozen teacher: the model's own architecture once more, without gradients, beside the student.

It is divided over tensor-parallel ranks and pipeline stages exactly as the student is, so that what
a rank needs of the teacher's logits is where the student's are. Under a pipeline both travel side
by side: the stage's tensor is the pair.

    first stage   tokens                          -> student's hidden, teacher's hidden
    others        student's hidden, teacher's     -> the same
    last stage    ...                             -> student's logits, teacher's logits

Between stages the teacher's part is a view as bytes: DeepSpeed sends gradients back for everything
that is floating-point.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from megasparse.config import ResolvedConfig
from megasparse.megatron.grid import Grid
from megasparse.megatron.model import build_model
from megasparse.megatron.parallel_linear import ParallelLinear
from megasparse.megatron.pipeline import finish_stage, part_specs, stage_bounds
from megasparse.sparsity.clock import Clock


class Teacher:
    """This rank's part of the teacher; its weights are put in by the caller.

    No module, so that no engine takes its parameters for the student's.

    Args:
        config: of the student's run.
        grid: this rank's place.
        padded_vocab_size: the student's.

    Attributes:
        view: a module with the whole model's parameter names.
        dtype: of its activations, and of its weights unless they are in FP8.
        stored: what its linears' weights are kept in, for messages.
        bytes_here: memory of its weights on this rank.
    """

    def __init__(self, config: ResolvedConfig, grid: Grid, padded_vocab_size: int) -> None:
        own = _teacher_config(config)
        self.dtype = torch.bfloat16 if own.train.bf16 else torch.float32
        self._in_fp8 = config.distillation.teacher_dtype == "fp8"
        self._first = grid.pp_rank == 0
        self._parts: list[Any] = []
        if grid.pp_size == 1:
            self.view: torch.nn.Module = build_model(own, grid, padded_vocab_size)
        else:
            bounds = stage_bounds(own)
            specs = part_specs(own, grid, padded_vocab_size, Clock(0, 1))
            here = specs[bounds[grid.pp_rank] : bounds[grid.pp_rank + 1]]
            modules = [spec.kind(**spec.options) for spec in here]
            self.view = finish_stage(modules, own, grid)
            for spec, module in zip(here, modules, strict=True):
                module.eval()
                self._parts.append((spec.forward, module))
        self.view.eval().requires_grad_(False)
        self.stored = "e4m3" if self._in_fp8 else str(self.dtype).removeprefix("torch.")
        self.bytes_here = 0

    def freeze(self) -> None:
        """Its weights are in: from now on they are only read."""
        self.bytes_here = 0
        if self._in_fp8:
            for module in self.view.modules():
                if isinstance(module, ParallelLinear):
                    self.bytes_here += module.freeze_in_fp8()
        self.bytes_here += sum(p.numel() * p.element_size() for p in self.view.parameters())

    @torch.no_grad()
    def logits(
        self, tokens: torch.Tensor, position_ids: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """`(B, S, V / tp)` of `(B, S)` int64 tokens, without a pipeline."""
        return self.view(tokens, position_ids, mask)

    @torch.no_grad()
    def run_stage(self, inputs: Any) -> torch.Tensor:
        """This stage's part.

        Args:
            inputs: (tokens, position_ids[, mask]) on the first stage, else (hidden as bytes
                [, mask]).

        Returns:
            The hidden state as bytes; logits `(S, B, V / tp)` on the last stage.
        """
        value: Any = inputs
        if not self._first:
            hidden = inputs[0].view(self.dtype)
            value = hidden if len(inputs) == 1 else (hidden, inputs[1])
        for forward, module in self._parts:
            value = module(value) if forward is None else forward(module, value)
        return value[0] if isinstance(value, tuple) else value


def pair(student: Any, teacher: torch.Tensor, last: bool) -> tuple[torch.Tensor, ...]:
    """What a stage gives to the next: (student's, teacher's as bytes[, mask]); or to the loss."""
    if last:
        return student, teacher
    as_bytes = teacher.contiguous().view(torch.uint8)
    if isinstance(student, tuple):
        return student[0], as_bytes, *student[1:]
    return student, as_bytes


def unpair(inputs: tuple[torch.Tensor, ...]) -> tuple[Any, tuple[torch.Tensor, ...]]:
    """The inputs of the student's stage and of the teacher's, from a `pair`."""
    student, teacher, *mask = inputs
    return (student, *mask) if mask else student, (teacher, *mask)


def _teacher_config(config: ResolvedConfig) -> ResolvedConfig:
    """The run's model with the teacher's precision; nothing is recomputed without gradients."""
    kinds = {"bf16": True, "fp32": False}
    bf16 = kinds.get(config.distillation.teacher_dtype or "", config.train.bf16)
    parallel = dataclasses.replace(
        config.parallel,
        recompute_granularity=None,
        recompute_method=None,
        recompute_num_layers=None,
    )
    return dataclasses.replace(
        config,
        parallel=parallel,
        train=dataclasses.replace(config.train, bf16=bf16),
    )
