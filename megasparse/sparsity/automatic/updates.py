"""The masked decay, brought to any optimizer by hooks around its step.

FST and SR-STE add `lambda (1 - M) o W` to the gradient between clipping and the update: a hook
before the step is that place. A step with a closure (Lightning, LBFGS) computes gradients inside,
so the closure is followed by the decay. AST's decay joins AdamW's momentum, behind the gradient:
there the hook takes the masked weights' gradients away from torch.optim.AdamW and updates these
weights itself, with its settings and its moments.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from megasparse.errors import ConfigError
from megasparse.kernels import AdamW, masked_adamw_, masked_decay_
from megasparse.sparsity.automatic.run import Run
from megasparse.sparsity.automatic.whole import local_of
from megasparse.sparsity.state import SparseWeight


class Layer(Protocol):
    """A linear layer with a state; None: it stays dense."""

    weight: torch.nn.Parameter

    @property
    def state(self) -> SparseWeight | None:
        """Mask and scale of the weight."""
        ...


class Target(NamedTuple):
    """What an optimizer holds of a weight.

    Attributes:
        tensor: one of the optimizer's: the weight, or its copy in float32, or a piece of that.
        cut: the part of the layer's mask that belongs to it, with as many entries.
    """

    tensor: torch.Tensor
    cut: Callable[[torch.Tensor], torch.Tensor]


# The target of a layer, by its name, among the tensors (by id) that an optimizer holds.
Locate = Callable[[str, Any, Mapping[int, torch.Tensor]], Target | None]


class Updates:
    """What happens around the steps of all optimizers that hold a sparse weight.

    Args:
        run: shared with the layers.
        layers: by name.
        locate: finds what an optimizer holds of a layer.
    """

    def __init__(self, run: Run, layers: Mapping[str, Any], locate: Locate) -> None:
        self._run, self._layers, self._locate = run, layers, locate
        self._decayed: tuple[int, set[str]] = (-1, set())  # step, layers decayed in it
        self._taken: list[tuple[str, Target, torch.Tensor]] = []

    @torch.no_grad()
    def before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        """Before `optimizer.step(*args, **kwargs)`; other arguments for it, or None.

        Args:
            args: with the optimizer itself first.
        """
        owned = self._owned(optimizer)
        if not owned or self._run.masked_decay() == 0.0:
            return None
        closure = kwargs.get("closure") or (args[1] if len(args) > 1 else None)
        if self._run.regulariser == "decoupled_masked_decay":
            self._check_adamw(optimizer, closure)
            self._take_gradients(owned)
            return None
        if closure is None:
            self._decay(owned, _loss_scale(optimizer))
            return None

        def with_decay() -> Any:
            with torch.enable_grad():
                loss = closure()
            self._decayed = (-1, set())  # gradients are new at every call
            with torch.no_grad():
                self._decay(owned, _loss_scale(optimizer))
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": with_decay}
        return (args[0], with_decay, *args[2:]), kwargs

    @torch.no_grad()
    def after(self, optimizer: torch.optim.Optimizer) -> None:
        """After a step."""
        taken, self._taken = self._taken, []
        skipped = _is_skipped(optimizer)
        for name, target, gradient in taken:
            target.tensor.grad = gradient
            if not skipped:
                self._masked_adamw(optimizer, name, target)
        if skipped:
            self._decayed = (-1, set())  # the step's next gradients are decayed again
        elif self._owned(optimizer):
            self._run.stepped = True

    @torch.no_grad()
    def by_hand(self) -> None:
        """Decay all gradients, for an optimizer that torch's hooks do not know."""
        if self._run.regulariser == "decoupled_masked_decay":
            return
        if self._run.masked_decay() and not self._run.stepped:
            everything = {id(layer.weight): layer.weight for layer in self._layers.values()}
            self._decay(self._targets(everything), 1.0)

    def _owned(self, optimizer: torch.optim.Optimizer) -> dict[str, Target]:
        """What an optimizer holds, by layer."""
        return self._targets({id(p): p for g in optimizer.param_groups for p in g["params"]})

    def _targets(self, held: Mapping[int, torch.Tensor]) -> dict[str, Target]:
        pairs = ((name, self._locate(name, layer, held)) for name, layer in self._layers.items())
        return {name: target for name, target in pairs if target is not None}

    def _decay(self, targets: dict[str, Target], loss_scale: float) -> None:
        """Add the decay to gradients, once a step."""
        strength, step = self._run.masked_decay() * loss_scale, self._run.clock.step
        if self._decayed[0] != step:
            self._decayed = (step, set())
        for name, (tensor, cut) in targets.items():
            mask = _mask_of(self._layers[name])
            if mask is None or tensor.grad is None or name in self._decayed[1]:
                continue
            self._decayed[1].add(name)
            weight = local_of(tensor.detach())
            masked_decay_(local_of(tensor.grad), weight, cut(mask).reshape(weight.shape), strength)

    def _check_adamw(self, optimizer: torch.optim.Optimizer, closure: Any) -> None:
        odd = [name for name in ("amsgrad", "maximize") if optimizer.defaults.get(name)]
        if not isinstance(optimizer, torch.optim.AdamW) or odd:
            found = type(optimizer).__name__ + (f" with {' and '.join(odd)}" if odd else "")
            raise ConfigError(
                f"recipe {self._run.recipe.name}: its decay joins the momentum of AdamW, but the "
                f"optimizer is {found}; expected torch.optim.AdamW, or masked_decay=0"
            )
        if closure is not None:
            raise ConfigError(
                f"recipe {self._run.recipe.name}: optimizer.step(closure) computes gradients "
                "inside the step; expected step() after backward, or masked_decay=0"
            )

    def _take_gradients(self, owned: dict[str, Target]) -> None:
        for name, target in owned.items():
            gradient = target.tensor.grad
            if _mask_of(self._layers[name]) is None or gradient is None:
                continue
            if target.tensor.dtype != torch.float32:
                raise ConfigError(
                    f"{name}: recipe {self._run.recipe.name} with {target.tensor.dtype} weights, "
                    "expected float32 (compute in 16 bits by torch.autocast)"
                )
            self._taken.append((name, target, gradient))
            target.tensor.grad = None

    def _masked_adamw(self, optimizer: torch.optim.Optimizer, name: str, target: Target) -> None:
        """Update one tensor as torch.optim.AdamW would, with the decay in the momentum."""
        tensor, mask = target.tensor, _mask_of(self._layers[name])
        assert mask is not None and tensor.grad is not None
        group = next(g for g in optimizer.param_groups if any(p is tensor for p in g["params"]))
        state = optimizer.state[tensor]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(tensor)
            state["exp_avg_sq"] = torch.zeros_like(tensor)
        state["step"] += 1
        numbers = AdamW(
            step=int(state["step"]),
            lr=float(group["lr"]),
            beta1=float(group["betas"][0]),
            beta2=float(group["betas"][1]),
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            clip=1.0 / _loss_scale(optimizer),
            decay=self._run.masked_decay(),
            decoupled=True,
        )
        tensors = (tensor.detach(), tensor.grad, state["exp_avg"], state["exp_avg_sq"])
        own, grad, exp_avg, exp_avg_sq = (local_of(one).view(-1) for one in tensors)
        masked_adamw_(own, grad, exp_avg, exp_avg_sq, numbers, target.cut(mask).reshape(-1))


def _mask_of(layer: Layer) -> torch.Tensor | None:
    """The mask that a layer is pruned by; of a soft threshold it only measures."""
    state = layer.state
    return state.mask if state is not None and state.now.has_mask else None


def _loss_scale(optimizer: torch.optim.Optimizer) -> float:
    """What gradients are still multiplied by: a GradScaler leaves it to some fused optimizers."""
    scale = getattr(optimizer, "grad_scale", None)
    return 1.0 if scale is None else float(scale)


def _is_skipped(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step changed nothing: fused optimizers are called by a GradScaler that found an
    infinity, and look for it themselves (others are not called)."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found > 0)


def install(updates: Updates, owner: object) -> list[Any]:
    """Hook into all torch optimizers until `owner` is gone; the hooks, to be removed earlier."""
    mine = weakref.ref(updates)

    def before(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        found = mine()
        return None if found is None else found.before(optimizer, args, kwargs)

    def after(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        found = mine()
        if found is not None:
            found.after(optimizer)

    hooks = [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]
    for hook in hooks:
        weakref.finalize(owner, hook.remove)
    return hooks
