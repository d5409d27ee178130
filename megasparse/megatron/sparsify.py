"""Turn the linears of a built model sparse, by name, and those of its blocks to FP8."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch

from megasparse.errors import ConfigError
from megasparse.fp8 import Scaling, shapes
from megasparse.megatron.blocks.experts import finish_expert_layers
from megasparse.megatron.blocks.mlp import fuse_mlps
from megasparse.megatron.blocks.norms import fuse_norms
from megasparse.megatron.expert_linear import ExpertLinear
from megasparse.megatron.parallel_linear import ParallelLinear
from megasparse.sparsity.clock import Clock, draw_key
from megasparse.sparsity.controller import SparsityController
from megasparse.sparsity.dense_weight import DenseFp8Weight
from megasparse.sparsity.gemms.dense_fp8 import OperandQuantizers
from megasparse.sparsity.recipe import SparsityRecipe
from megasparse.sparsity.state import Reduce, SparseWeight
from megasparse.timer import StepTimer

BLOCK = 4


def sparsify(
    model: torch.nn.Module,
    recipe: SparsityRecipe,
    clock: Clock,
    reduce: Reduce | None = None,
    reduce_max: Reduce | None = None,
    monitor: bool = True,
    num_layers: int = 0,
    timer: StepTimer | None = None,
    slorb_k: int | None = None,
    slorb_train_projection: bool = True,
    fp8: Scaling | None = None,
    fp8_hybrid: bool = False,
    make_controller: Callable[..., SparsityController] = SparsityController,
) -> SparsityController:
    """Give every linear that the recipe makes sparse its state, and all linears their FP8 GEMMs.

    Args:
        model: built with `SparseSpecProvider`; the whole, or a pipeline stage with the whole's
            names.
        recipe: a dense one prunes nothing.
        clock: the run's; shared with the layers.
        reduce: sum over the tensor-parallel group.
        reduce_max: largest over the ranks that share a micro-batch's activations.
        monitor: keep masks and flips up to date in dense phases.
        num_layers: of the whole model; a stage without a match is no error if another has one.
        timer: of the run.
        slorb_k: add SLoRB's low-rank branch, of rank inputs / k; None: none.
        slorb_train_projection: whether its projection is a parameter.
        fp8: compute the GEMMs of all linears, sparse or not, in FP8, scaled by it; None: in the
            model's dtype.
        fp8_hybrid: output gradients in e5m2 where their GEMM is dense.
        make_controller: a controller of another kind.

    Raises:
        ConfigError: a pattern that matches nothing, a shard that cuts a 4x4 block, or one that FP8
            GEMMs do not take.
    """
    finish_expert_layers(model)
    controller = make_controller(recipe, clock, monitor, timer=timer or StepTimer(), fp8=fp8)
    linears = {
        name: module for name, module in model.named_modules() if isinstance(module, ParallelLinear)
    }
    unmatched = recipe.unmatched(_in_all(linears, num_layers)) if recipe.is_sparse else []
    for pattern in unmatched:
        raise ConfigError(
            f"sparse_layers: no linear is named like {pattern!r}; "
            f"there are {', '.join(_kinds(linears))}"
        )
    for name, module in linears.items():
        experts = module.experts if isinstance(module, ExpertLinear) else None
        grouped = experts is not None and module.config.moe_grouped_gemm
        if not recipe.matches(name):
            if fp8 is not None:
                _check_fp8(name, module, experts, sparse=False)
                quantizers = OperandQuantizers.of(fp8, module.shard.dim, experts is not None)
                dense = DenseFp8Weight(f"{name}.weight", quantizers, fp8_hybrid, experts, grouped)
                module.make_dense_fp8(dense, controller)
            continue
        _check_blocks(name, module)
        state = SparseWeight(
            f"{name}.weight", recipe, module.shard, reduce, reduce_max, module.tokens, experts
        )
        if experts is not None:
            state.grouped = grouped
            state.active_share = module.config.moe_router_topk / experts
        if fp8 is not None:
            _check_fp8(name, module, experts, sparse=True)
            quantizers = OperandQuantizers.of(fp8, module.shard.dim, experts is not None)
            state.quantizers, state.fp8_hybrid = quantizers, fp8_hybrid
        module.make_sparse(state, controller, draw_key(name))
        if recipe.weight_scale_groups:
            module.add_weight_scale(recipe.weight_scale_groups)
        if slorb_k is not None:
            module.add_low_rank_branch(slorb_k, slorb_train_projection)
    if fp8 is not None:
        fp8.allocate()
        fuse_mlps(model)
        fuse_norms(model)
    return controller


def initial_low_rank_weights(
    model: torch.nn.Module,
) -> list[tuple[torch.nn.Parameter, torch.Tensor]]:
    """SLoRB's parameters of this rank with the values that follow from the weights."""
    linears = [m for m in model.modules() if isinstance(m, ParallelLinear)]
    return [value for module in linears for value in module.initial_low_rank_weights()]


def low_rank_weight_names(model: torch.nn.Module) -> frozenset[str]:
    """Names of SLoRB's parameters, and of CAST's scales; a dense model has none of them."""
    return frozenset(
        name
        for name, _ in model.named_parameters()
        if name.endswith((".slorb_adapter", ".slorb_projection", ".weight_scale"))
    )


def _in_all(linears: dict[str, ParallelLinear], num_layers: int) -> set[str]:
    """The names that the linears of a stage have in all layers of the model."""
    numbers = range(num_layers)
    return set(linears) | {
        re.sub(r"\blayers\.\d+\b", f"layers.{n}", name) for name in linears for n in numbers
    }


def _check_blocks(name: str, module: ParallelLinear) -> None:
    shard = module.shard
    rows, columns = shard.local_shape
    lengths = [s.length for s in shard.slices(0)] + [rows, columns]
    if any(length % BLOCK for length in lengths):
        raise ConfigError(
            f"{name}: a shard of {rows} x {columns} (tensor_model_parallel_size {shard.world}, "
            f"{shard.parts} fused parts) cuts a {BLOCK}x{BLOCK} block"
        )


def _check_fp8(name: str, module: ParallelLinear, experts: int | None, sparse: bool) -> None:
    shard, one = module.shard, experts or 1
    shape = (shard.local_shape[0] // one, shard.local_shape[1])
    parts = shard.parts // one if shard.dim == 0 else 1
    reason = shapes.refusal(name, shape, shard.world, parts, sparse)
    if reason is not None:
        raise ConfigError(reason)


def _kinds(names: Sequence[str] | dict[str, ParallelLinear]) -> list[str]:
    return sorted({"*." + ".".join(name.split(".")[-2:]) for name in names})
