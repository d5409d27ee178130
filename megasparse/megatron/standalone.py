"""2:4 layers in a training loop that is not ours: Megatron-LM's, or one of your own.

Nothing has to be called in the loop. Any optimizer that steps on the weights, Megatron's included,
counts the step by torch's hooks, and gets the masked decay between clipping and update; draws are
numbered by backward passes; masks, scales and FP8 state are in the model's own `state_dict` and
`sharded_state_dict`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megasparse.errors import ConfigError
from megasparse.fp8 import CurrentScaling, DelayedScaling, Scaling
from megasparse.megatron.expert_linear import ExpertLinear
from megasparse.megatron.parallel_linear import ParallelLinear
from megasparse.megatron.sparsify import sparsify
from megasparse.sparsity.autograd.linear import Seed
from megasparse.sparsity.automatic.run import Run
from megasparse.sparsity.automatic.updates import Target, Updates, install
from megasparse.sparsity.clock import Clock
from megasparse.sparsity.controller import SparsityController
from megasparse.sparsity.recipe import SparsityRecipe, recipe_with

ENDLESS = 2**62


@dataclass
class AutomaticController(SparsityController):
    """A controller whose clock goes by optimizers' steps.

    Attributes:
        run: shared with the hooks.
        draws: by layer, the step and the number of backward passes in it.
    """

    run: Run | None = None
    draws: dict[int, tuple[int, int]] = field(default_factory=dict)

    def begin_forward(self) -> None:
        """The next step begins with the first pass after an optimizer's step."""
        assert self.run is not None
        self.run.begin_forward()

    def seed(self, place: int) -> Seed:
        """Asked in the backward pass, so that recomputation draws what it would have drawn."""

        def now() -> int:
            assert self.run is not None
            step, number = self.draws.get(place, (0, 0))
            number = number if step == self.clock.step else 0
            self.draws[place] = (self.clock.step, number + 1)
            return self.run.seed(self.layers[place], number)

        return now

    @property
    def steps_done(self) -> int:
        """Optimizer steps, one that no forward pass has followed included."""
        assert self.run is not None
        return self.clock.step + self.run.stepped

    def set_steps_done(self, step: int) -> None:
        """Of a checkpoint that was loaded."""
        assert self.run is not None
        self.clock.step, self.run.stepped = step, False


class Sparsity:
    """What `sparsify_model` returns.

    Attributes:
        controller: of the masks, scales and operands.
    """

    def __init__(self, controller: AutomaticController, layers: dict[str, ParallelLinear]) -> None:
        assert controller.run is not None
        self.controller = controller
        self._layers = layers
        self._ranges: dict[int, tuple[int, int]] = {}
        self._attached = False
        self._updates = Updates(controller.run, layers, self._locate)
        self._hooks = install(self._updates, self)

    def attach(self, optimizer: Any) -> None:
        """Tell which pieces of 16-bit weights a DistributedOptimizer of Megatron holds.

        Other optimizers need no call. Without it such an optimizer's first step is refused.
        """
        self._attached = True
        for one in getattr(optimizer, "chained_optimizers", [optimizer]):
            for layer in self._layers.values():
                if layer.weight in getattr(one, "model_param_gbuf_map", {}):
                    piece = one._get_model_param_range_map(layer.weight)["param"]
                    self._ranges[id(layer.weight)] = (piece.start, piece.end)

    def _locate(
        self, name: str, layer: ParallelLinear, held: Mapping[int, torch.Tensor]
    ) -> Target | None:
        """The weight, its float32 copy, or the piece of that on this rank."""
        weight = layer.weight
        if id(weight) in held:
            return Target(weight, lambda mask: mask)
        if not self._attached and self._shards:
            raise ConfigError(
                f"{name}: a distributed optimizer holds pieces of weights, expected "
                "sparsity.attach(optimizer) before its first step"
            )
        main = getattr(weight, "main_param", None)
        if main is None:
            return _view_of(weight, held)
        if id(main) not in held:
            return None
        start, end = self._ranges.get(id(weight), (0, weight.numel()))
        return _piece(main, start, end)

    @property
    def _shards(self) -> bool:
        """Whether an optimizer has cut weights into pieces, on this rank or others."""
        weights = (layer.weight for layer in self._layers.values())
        return any(getattr(weight, "main_param_sharded", False) for weight in weights)


def sparsify_model(
    model: torch.nn.Module | Sequence[torch.nn.Module],
    recipe: str | SparsityRecipe = "fst",
    *,
    train_iters: int | None = None,
    seed: int = 1234,
    fp8: str | None = None,
    fp8_hybrid: bool = False,
    slorb_k: int | None = None,
    monitor: bool = True,
    **settings: Any,
) -> Sparsity:
    """Make the linears of a model built with `SparseSpecProvider` 2:4, for any training loop.

    Call it once, before Megatron's DistributedDataParallel and optimizer are built.

    Args:
        model: a `GPTModel`, or the list of this rank's chunks of a pipeline.
        recipe: a preset's name, or one made by `make_recipe`.
        train_iters: optimizer steps of the run, from which a dense warm-up or tail follows. None:
            it is sparse from its first step to its last.
        seed: of the random draws (MVUE).
        fp8: all linears in FP8, with "delayed" or "tensorwise" scaling; None: none.
        fp8_hybrid: output gradients in e5m2 where their GEMM is dense.
        slorb_k: add SLoRB's low-rank branch, of rank inputs / k.
        monitor: keep masks and flips in dense phases too.
        settings: of the recipe, such as `masked_decay`, `sparse_layers`.

    Raises:
        ConfigError: an unknown recipe or setting; see `sparsify`.
    """
    made = recipe_with(recipe, settings, train_iters)
    chunks = [model] if isinstance(model, torch.nn.Module) else list(model)
    whole = _Whole(chunks)
    layers = {n: m for n, m in whole.named_modules() if isinstance(m, ParallelLinear)}
    if not layers:
        raise ConfigError("sparsify_model: no linears of SparseSpecProvider in the model")
    if any(isinstance(layer, ExpertLinear) for layer in layers.values()):
        raise ConfigError("sparsify_model: the model has experts, which runs of megasparse train")
    group = next(iter(layers.values())).tp_group
    device = next(iter(layers.values())).weight.device
    scaling = _scaling(fp8, device, _largest(group))
    clock = Clock(seed, ENDLESS if train_iters is None else train_iters)
    data_parallel = parallel_state.get_data_parallel_group(with_context_parallel=True)
    run = Run(made, clock, monitor, scaling, data_parallel)

    config = getattr(chunks[0], "config", None)
    built = sparsify(
        whole,
        made,
        clock,
        _sum(group),
        _largest(group),
        monitor,
        num_layers=getattr(config, "num_layers", 0),
        slorb_k=slorb_k,
        fp8=scaling,
        fp8_hybrid=fp8_hybrid,
        make_controller=partial(AutomaticController, run=run),
    )
    assert isinstance(built, AutomaticController)
    _initialize_low_rank(layers.values())
    handle = Sparsity(built, {n: m for n, m in layers.items() if m.state is not None or fp8})
    for layer in layers.values():
        layer.__dict__["_sparsity"] = handle  # it lives as long as the model
    return handle


def _view_of(weight: torch.Tensor, held: Mapping[int, torch.Tensor]) -> Target | None:
    """The piece of a float32 weight that a distributed optimizer holds: a view of it."""
    first, size = weight.data_ptr(), weight.element_size()
    for tensor in held.values():
        start = (tensor.data_ptr() - first) // size
        same = tensor.dtype == weight.dtype and tensor.device == weight.device
        if same and tensor.numel() and 0 <= start < weight.numel():
            return _piece(tensor, start, start + tensor.numel())
    return None


def _piece(tensor: torch.Tensor, start: int, end: int) -> Target:
    """Entries of a flat weight, and of its mask."""
    return Target(tensor, lambda mask: mask.reshape(-1)[start:end])


class _Whole(torch.nn.Module):
    """This rank's chunks with the names that their modules have in the whole model."""

    def __init__(self, chunks: Sequence[torch.nn.Module]) -> None:
        super().__init__()
        self._chunks = [_bare(chunk) for chunk in chunks]

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.nn.Module]]:
        for chunk in self._chunks:
            numbers = {
                name: int(module.layer_number) - 1
                for name, module in chunk.named_modules()
                if re.search(r"\blayers\.\d+$", name) and hasattr(module, "layer_number")
            }
            for name, module in chunk.named_modules(*args, **kwargs):
                parts = name.split(".")
                for end in range(len(parts), 0, -1):
                    number = numbers.get(".".join(parts[:end]))
                    if number is not None:
                        parts[end - 1] = str(number)
                yield ".".join(parts), module


def _bare(module: torch.nn.Module) -> torch.nn.Module:
    while isinstance(inner := getattr(module, "module", None), torch.nn.Module):
        module = inner
    return module


def _scaling(
    fp8: str | None, device: torch.device, largest: Callable[[torch.Tensor], torch.Tensor]
) -> Scaling | None:
    if fp8 is None:
        return None
    if fp8 not in ("delayed", "tensorwise"):
        raise ConfigError(f"fp8 {fp8!r}, expected None, 'delayed' or 'tensorwise'")
    if fp8 == "tensorwise":
        return CurrentScaling(largest)
    return DelayedScaling(device, reduce_max=largest)


def _sum(group: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    def reduce(tensor: torch.Tensor) -> torch.Tensor:
        if group.size() > 1:
            dist.all_reduce(tensor, group=group)
        return tensor

    return reduce


def _largest(group: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    def reduce(tensor: torch.Tensor) -> torch.Tensor:
        if group.size() > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=group)
        return tensor

    return reduce


@torch.no_grad()
def _initialize_low_rank(layers: Any) -> None:
    for layer in layers:
        for parameter, value in layer.initial_low_rank_weights():
            parameter.copy_(value)
