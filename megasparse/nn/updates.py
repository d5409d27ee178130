"""The masked decay, brought to any optimizer by hooks around its step.

FST and SR-STE add `lambda (1 - M) o W` to the gradient between clipping and the update: a hook
before the step is that place. A step with a closure (Lightning, LBFGS) computes gradients inside,
so the closure is followed by the decay. AST's decay joins AdamW's momentum, behind the gradient:
there the hook takes the masked weights' gradients away from torch.optim.AdamW and updates these
weights itself, with its settings and its moments.
"""

from __future__ import annotations

from typing import Any

import torch

from megasparse.errors import ConfigError
from megasparse.kernels import AdamW, masked_adamw_, masked_decay_
from megasparse.nn.linear import SparseLinear
from megasparse.nn.run import Run
from megasparse.nn.whole import local_of, part_of


class Updates:
    """What happens around the steps of all optimizers that hold a sparse weight.

    Args:
        run: shared with the layers.
        layers: by name.
    """

    def __init__(self, run: Run, layers: dict[str, SparseLinear]) -> None:
        self._run, self._layers = run, layers
        self._decayed: tuple[int, set[str]] = (-1, set())  # step, layers decayed in it
        self._taken: list[tuple[SparseLinear, str, torch.Tensor]] = []

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
        if self._run.recipe.regulariser == "decoupled_masked_decay":
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
        for layer, name, gradient in taken:
            layer.weight.grad = gradient
            self._masked_adamw(optimizer, layer, name)
        if self._owned(optimizer):
            self._run.stepped = True

    @torch.no_grad()
    def by_hand(self) -> None:
        """Decay all gradients, for an optimizer that torch's hooks do not know."""
        if self._run.recipe.regulariser == "decoupled_masked_decay":
            return
        if self._run.masked_decay() and not self._run.stepped:
            self._decay(self._layers, 1.0)

    def _owned(self, optimizer: torch.optim.Optimizer) -> dict[str, SparseLinear]:
        """The layers whose weights an optimizer holds."""
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return {name: layer for name, layer in self._layers.items() if id(layer.weight) in held}

    def _decay(self, layers: dict[str, SparseLinear], loss_scale: float) -> None:
        """Add the decay to gradients, once a step."""
        strength, step = self._run.masked_decay() * loss_scale, self._run.clock.step
        if self._decayed[0] != step:
            self._decayed = (step, set())
        for name, layer in layers.items():
            mask, weight = _mask_of(layer), layer.weight
            if mask is None or weight.grad is None or name in self._decayed[1]:
                continue
            self._decayed[1].add(name)
            own = part_of(mask, weight, name)
            masked_decay_(local_of(weight.grad), local_of(weight).detach(), own, strength)

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

    def _take_gradients(self, owned: dict[str, SparseLinear]) -> None:
        for name, layer in owned.items():
            gradient = layer.weight.grad
            if _mask_of(layer) is None or gradient is None:
                continue
            if layer.weight.dtype != torch.float32:
                raise ConfigError(
                    f"{name}: recipe {self._run.recipe.name} with {layer.weight.dtype} weights, "
                    "expected float32 (compute in 16 bits by torch.autocast)"
                )
            self._taken.append((layer, name, gradient))
            layer.weight.grad = None

    def _masked_adamw(
        self, optimizer: torch.optim.Optimizer, layer: SparseLinear, name: str
    ) -> None:
        """Update one weight as torch.optim.AdamW would, with the decay in the momentum."""
        weight, mask = layer.weight, _mask_of(layer)
        assert mask is not None and weight.grad is not None
        group = next(g for g in optimizer.param_groups if any(p is weight for p in g["params"]))
        state = optimizer.state[weight]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(weight)
            state["exp_avg_sq"] = torch.zeros_like(weight)
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
        tensors = (weight.detach(), weight.grad, state["exp_avg"], state["exp_avg_sq"])
        own, grad, exp_avg, exp_avg_sq = (local_of(tensor).view(-1) for tensor in tensors)
        kept = part_of(mask, weight, name).reshape(-1)
        masked_adamw_(own, grad, exp_avg, exp_avg_sq, numbers, kept)


def _mask_of(layer: SparseLinear) -> torch.Tensor | None:
    """The mask that a layer is pruned by; of a soft threshold it only measures."""
    state = layer.state
    return state.mask if state is not None and state.recipe.has_mask else None


def _loss_scale(optimizer: torch.optim.Optimizer) -> float:
    """What gradients are still multiplied by: a GradScaler leaves it to some fused optimizers."""
    scale = getattr(optimizer, "grad_scale", None)
    return 1.0 if scale is None else float(scale)
