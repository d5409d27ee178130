"""`sparsify_`: turn linears of any PyTorch model 2:4, in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist

from megasparse.errors import ConfigError
from megasparse.fp8 import CurrentScaling, DelayedScaling, Scaling, shapes
from megasparse.fp8.transformer_engine import refusal as fp8_refusal
from megasparse.nn.handle import SparsityHandle
from megasparse.nn.linear import SparseLinear
from megasparse.sparsity.automatic.run import Run
from megasparse.sparsity.clock import Clock
from megasparse.sparsity.dense_weight import DenseFp8Weight
from megasparse.sparsity.gemms.dense_fp8 import OperandQuantizers
from megasparse.sparsity.recipe import SparsityRecipe, recipe_with
from megasparse.sparsity.shard import WeightShard
from megasparse.sparsity.state import SparseWeight

BLOCK = 4
ENDLESS = 2**62  # steps of a run whose length is not known

Fp8 = Literal["delayed", "tensorwise"]


def sparsify_(
    model: torch.nn.Module,
    recipe: str | SparsityRecipe = "fst",
    layers: Sequence[str] = ("*.mlp.*",),
    fp8: Fp8 | None = None,
    *,
    train_iters: int | None = None,
    seed: int = 1234,
    fp8_layers: Sequence[str] = (),
    fp8_hybrid: bool = False,
    monitor: bool = True,
    process_group: dist.ProcessGroup | None = None,
    **settings: Any,
) -> SparsityHandle:
    """Train linears of a model 2:4 from here on: they are swapped in place, by name.

    Parameters stay the same objects, so the optimizer may be made before or after. Call it before
    DDP, `fully_shard` and `torch.compile`, or at least before the first forward pass.

    Args:
        model: any module with `torch.nn.Linear`s.
        recipe: "fst", "s_ste", "ast", "sr_ste", "ste", "dense", or one made by `make_recipe`.
        layers: shell patterns of the names of the linears, as `model.named_modules()` has them.
        fp8: compute their GEMMs in FP8, scaled by earlier steps' magnitudes ("delayed") or by each
            tensor's own ("tensorwise"); None: in the model's precision, or autocast's.
        train_iters: optimizer steps of the run, from which a dense warm-up or tail follows. None:
            the run is sparse from its first step to its last.
        seed: of the random draws (MVUE).
        fp8_layers: patterns of further linears, computed dense in FP8.
        fp8_hybrid: output gradients in e5m2 where their GEMM is dense.
        monitor: keep masks and flip counts in dense phases too.
        process_group: the data-parallel ranks; by default all. Each draws numbers of its own.
        settings: of the recipe, such as `masked_decay`, `mask_update_interval`, `mvue`,
            `dense_tail_fraction`.

    Returns: the handle: `state_dict`, `verify`, `finalize`, `metrics`.

    Raises:
        ConfigError: an unknown recipe or setting, a pattern without a linear, a shape that 2:4 or
            FP8 GEMMs do not take, a weight that several modules share.
    """
    patterns = (layers,) if isinstance(layers, str) else tuple(layers)
    made = recipe_with(recipe, {**settings, "sparse_layers": patterns}, train_iters)
    clock = Clock(seed, ENDLESS if train_iters is None else train_iters)
    linears = _linears(model, made, fp8_layers, fp8)
    _refuse_shared_weights(model, linears)
    for name, linear in linears.items():
        _check_shape(name, linear, made.matches(name), fp8 is not None)
    scaling = None if fp8 is None else _scaling(fp8, linears)
    run = Run(made, clock, monitor, scaling, process_group)
    swapped = {}
    for name, linear in linears.items():
        quantizers = None if scaling is None else OperandQuantizers.of(scaling)
        owner: SparseWeight | DenseFp8Weight
        if made.matches(name):
            shard = WeightShard((linear.out_features, linear.in_features))
            owner = SparseWeight(f"{name}.weight", made, shard)
            owner.quantizers, owner.fp8_hybrid = quantizers, fp8_hybrid
            owner.train_iters = clock.train_iters
        else:
            assert quantizers is not None
            owner = DenseFp8Weight(f"{name}.weight", quantizers, fp8_hybrid)
        swapped[name] = SparseLinear.become(linear, owner, name, run)
    if scaling is not None:
        scaling.allocate()
    handle = SparsityHandle(run, swapped)
    for layer in swapped.values():
        layer.__dict__["_handle"] = handle  # it lives as long as the model
    return handle


def _linears(
    model: torch.nn.Module, recipe: SparsityRecipe, fp8_layers: Sequence[str], fp8: Fp8 | None
) -> dict[str, torch.nn.Linear]:
    """The linears to swap, by name."""
    if any(isinstance(module, SparseLinear) for module in model.modules()):
        raise ConfigError("sparsify_: the model is sparse already; call finalize() first")
    there = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    if fp8_layers and fp8 is None:
        raise ConfigError("fp8_layers is given without fp8, expected 'delayed' or 'tensorwise'")
    # Without a sparse recipe, what is named is computed dense in FP8. A recipe knows patterns.
    patterns = tuple(fp8_layers) + (() if recipe.is_sparse or fp8 is None else recipe.sparse_layers)
    in_fp8 = SparsityRecipe("ste", patterns, projection="row")
    missed = [*(recipe.unmatched(there) if recipe.is_sparse else ()), *in_fp8.unmatched(there)]
    if missed:
        kinds = sorted({"*." + ".".join(name.split(".")[-2:]) for name in there})
        listed = ", ".join(kinds[:12]) + (", ..." if len(kinds) > 12 else "")
        raise ConfigError(
            f"layers: no torch.nn.Linear is named like {missed[0]!r}; there are "
            f"{listed or 'none in this model (Conv1D and others are not taken)'}"
        )
    chosen = {n: m for n, m in there.items() if recipe.matches(n) or in_fp8.matches(n)}
    for name, module in chosen.items():
        if type(module).forward is not torch.nn.Linear.forward:
            raise ConfigError(
                f"{name}: is a {type(module).__name__} with a forward pass of its own, expected "
                "torch.nn.Linear's; call sparsify_ before what changes the model's linears"
            )
    return chosen


def _refuse_shared_weights(model: torch.nn.Module, linears: dict[str, torch.nn.Linear]) -> None:
    """A weight that an embedding shares would be pruned there, too."""
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            users.setdefault(id(parameter), []).append(name)
    for name, linear in linears.items():
        others = [other for other in users[id(linear.weight)] if other != name]
        if others:
            raise ConfigError(
                f"{name}: its weight is shared with {others[0]}, expected one of its own; leave "
                "the layer out of `layers`"
            )


def _check_shape(name: str, linear: torch.nn.Linear, sparse: bool, fp8: bool) -> None:
    rows, columns = linear.out_features, linear.in_features
    if sparse and (rows % BLOCK or columns % BLOCK):
        raise ConfigError(
            f"{name}: a weight of {rows} x {columns} cuts a {BLOCK}x{BLOCK} block; leave the layer "
            "out of `layers`"
        )
    reason = shapes.refusal(name, (rows, columns), 1, 1, sparse) if fp8 else None
    if reason is not None:
        raise ConfigError(reason)


def _scaling(fp8: Fp8, linears: dict[str, torch.nn.Linear]) -> Scaling:
    """The scaling of a model's FP8 operands, on its device."""
    if fp8 not in ("delayed", "tensorwise"):
        raise ConfigError(f"fp8 {fp8!r}, expected None, 'delayed' or 'tensorwise'")
    device = next(iter(linears.values())).weight.device
    if device.type == "cuda" and (reason := fp8_refusal(device)):
        raise ConfigError(f"fp8 {fp8!r}: {reason}")
    if fp8 == "tensorwise":
        return CurrentScaling()
    if device.type == "meta":
        raise ConfigError(
            "fp8 'delayed': the model is on the meta device, expected its own; or 'tensorwise'"
        )
    return DelayedScaling(device)
