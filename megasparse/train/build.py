"""The engine of a run: model, sparsity and DeepSpeed for its layout."""

from __future__ import annotations

import torch

from megasparse.config import ResolvedConfig
from megasparse.distributed.events import NO_LISTENERS, Events
from megasparse.errors import ConfigError
from megasparse.fp8 import Scaling, transformer_engine
from megasparse.fp8.current import CurrentScaling
from megasparse.fp8.delayed import DelayedScaling
from megasparse.kernels.packed24 import E4M3
from megasparse.kernels.spmm24.agreement import packing_disagreement
from megasparse.log import warn_once
from megasparse.megatron.comm.linear import exchange_through
from megasparse.megatron.comm.peer_memory import peer_memory
from megasparse.megatron.grid import Grid
from megasparse.megatron.model import build_model, hide_padding
from megasparse.megatron.sparsify import sparsify
from megasparse.sparsity.clock import Clock
from megasparse.sparsity.controller import SparsityController
from megasparse.sparsity.recipe import SparsityRecipe
from megasparse.timer import StepTimer
from megasparse.train.distillation import Distillation
from megasparse.train.engine.base import Engine
from megasparse.train.engine.layout import Layout
from megasparse.train.engine.pipeline import PipelineLayout
from megasparse.train.engine.plain import PlainLayout
from megasparse.train.engine.stage import Pipeline
from megasparse.train.engine.step_guard import Poison


def build_engine(
    config: ResolvedConfig,
    grid: Grid,
    recipe: SparsityRecipe,
    padded_vocab_size: int,
    events: Events = NO_LISTENERS,
    poison: Poison | None = None,
    vocab_size: int | None = None,
) -> Engine:
    """This rank's part of the model, sparse by the recipe, in the engine of its layout.

    Args:
        events: called at every point of a step.
        poison: values to be made NaN or infinite; none by default.
        vocab_size: before padding; None: nothing is padding.
    """
    clock = Clock(config.train.seed, config.train.train_iters)

    scales = _fp8_scales(config, grid, recipe.is_sparse)

    def make_sparse(model: torch.nn.Module) -> SparsityController:
        return sparsify(
            model,
            recipe,
            clock,
            reduce=grid.sum_over_tp,
            reduce_max=grid.max_over_tp_cp,
            monitor=config.sparsity.track_flip_rate,
            num_layers=config.model.num_layers,
            timer=StepTimer(grid.device),
            slorb_k=config.sparsity.slorb_k,
            slorb_train_projection=config.sparsity.slorb_train_projection,
            fp8=scales,
            fp8_hybrid=config.fp8.fp8_format == "hybrid",
        )

    teaching = None
    if config.distillation.kd_loss_weight:
        teaching = Distillation(config, grid, padded_vocab_size, vocab_size)
    layout: Layout
    if grid.pp_size > 1:
        pipeline = Pipeline(config, grid, padded_vocab_size, clock, teaching)
        hide_padding(pipeline, grid, vocab_size)
        controller = make_sparse(pipeline.view)
        _open_peer_memory(pipeline.view, config, grid)
        layout = PipelineLayout(config, grid, pipeline, controller, events, poison)
    else:
        model = build_model(config, grid, padded_vocab_size)
        hide_padding(model, grid, vocab_size)
        controller = make_sparse(model)
        _open_peer_memory(model, config, grid)
        layout = PlainLayout(config, grid, model, controller, events, poison, teaching)
    return Engine(config, grid, layout, controller)


def _open_peer_memory(model: torch.nn.Module, config: ResolvedConfig, grid: Grid) -> None:
    """Let the linears exchange through the memory of the group's GPUs, where that can be."""
    if config.parallel.sequence_parallel and config.parallel.tp_comm_peer_memory:
        exchange_through(model, peer_memory(grid.tp_group, grid.device))


def _fp8_scales(config: ResolvedConfig, grid: Grid, sparse: bool) -> Scaling | None:
    """Scaling of the linears' FP8 operands, or None when they are not in FP8.

    Raises:
        ConfigError: FP8 cannot run here.
    """
    settings = config.fp8
    if settings.fp8_format is None:
        return None
    on_gpu = grid.device.type == "cuda"
    if on_gpu and (reason := transformer_engine.refusal(grid.device)):
        raise ConfigError(f"fp8_format {settings.fp8_format}: {reason}")
    if on_gpu and sparse and (reason := packing_disagreement(grid.device, E4M3)):
        warn_once("FP8 is not used, the linears stay in bfloat16: %s", reason)
        return None
    if settings.fp8_recipe == "tensorwise":
        # With context parallelism every rank scales by its own tokens, as Transformer Engine does.
        return CurrentScaling(
            grid.max_over_tp if grid.tp_size > 1 else None,
            grid.max_over_tp_ep if grid.tp_size * grid.ep_size > 1 else None,
        )
    return DelayedScaling(
        grid.device,
        settings.fp8_amax_history_len,
        settings.fp8_amax_compute_algo,  # type: ignore[arg-type]
        settings.fp8_margin,
        grid.max_over_stage,
    )
