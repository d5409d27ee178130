"""AdamW with a masked decay, on the gradient (FST, SR-STE) or decoupled from momentum (AST).

    on the gradient   g <- clip(g) + lambda (1 - M) o W, then AdamW as usual          FST eq. 1.4
    decoupled         m <- b1 m + (1 - b1) g
                      u  = m + lambda (1 - M) o W
                      v <- b2 v + (1 - b2) u^2
                      W <- W (1 - lr wd) - lr / (1 - b1^t) * u / (sqrt(v / (1 - b2^t)) + eps)
                                                                                  AST section 3.2

The decoupled form holds for masked weights; all others take torch's AdamW.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch


class MaskedAdamW(torch.optim.AdamW):
    """torch's AdamW that asks before it steps, and steps masked tensors AST's way if told to.

    Args:
        params: parameter groups.
        before_step: called with the optimizer once gradients are final (unscaled, and clipped
            where DeepSpeed clips); adds the masked decay; returning False leaves everything as
            it is.
        decoupled_decay: gives `lambda (1 - M) o W` for one of the optimizer's tensors, in its
            shape, or None for tensors without a mask. Unset: no decoupled decay.
        options: torch.optim.AdamW's (lr, betas, eps, weight_decay).
    """

    def __init__(
        self,
        params: Iterable[Any],
        before_step: Callable[[torch.optim.Optimizer], bool],
        decoupled_decay: Callable[[torch.Tensor], torch.Tensor | None] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(params, **options)
        self._before_step = before_step
        self._decoupled_decay = decoupled_decay

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimizer step over all groups (ZeRO calls it group by group)."""
        if not self._before_step(self):
            return None
        if self._decoupled_decay is None:
            return super().step(closure)
        held_back = []
        for group in self.param_groups:
            for tensor in group["params"]:
                decay = self._decoupled_decay(tensor)
                if decay is None or tensor.grad is None:
                    continue
                self._step_decoupled(group, tensor, decay)
                held_back.append((tensor, tensor.grad))
                tensor.grad = None  # torch's AdamW passes over tensors without one
        result = super().step(closure)
        for tensor, gradient in held_back:
            tensor.grad = gradient
        return result

    def _step_decoupled(
        self, group: dict[str, Any], tensor: torch.Tensor, decay: torch.Tensor
    ) -> None:
        state = self.state[tensor]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(tensor)
            state["exp_avg_sq"] = torch.zeros_like(tensor)
        state["step"] += 1
        assert tensor.grad is not None
        ast_adamw_(
            tensor,
            tensor.grad,
            state["exp_avg"],
            state["exp_avg_sq"],
            decay,
            step=int(state["step"]),
            lr=float(group["lr"]),
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
        )


def ast_adamw_(
    weight: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    decay: torch.Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """AST's AdamW (Huang et al., AAAI 2025, section 3.2) in place, on tensors of one shape.

        m <- b1 m + (1 - b1) g,   u = m + decay,   v <- b2 v + (1 - b2) u^2
        W <- W (1 - lr wd) - lr / (1 - b1^step)  u / (sqrt(v / (1 - b2^step)) + eps)

    Args:
        weight: the master weight, float32, or a flat piece of it.
        grad: clipped, in the weight's dtype.
        exp_avg, exp_avg_sq: m and v.
        decay: `lambda (1 - M) o W` of the weight before the step.
        step: number of this update, from 1.
        lr, betas, eps, weight_decay: as AdamW's.
    """
    beta1, beta2 = betas
    exp_avg.lerp_(grad, 1 - beta1)
    update = exp_avg + decay
    exp_avg_sq.mul_(beta2).addcmul_(update, update, value=1 - beta2)
    denominator = exp_avg_sq.sqrt().div_(math.sqrt(1 - beta2**step)).add_(eps)
    weight.mul_(1 - lr * weight_decay)
    weight.addcdiv_(update, denominator, value=-lr / (1 - beta1**step))


def parameter_groups(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
    masked: set[int],
    weight_decay: float,
    ends: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Groups for AdamW: masked matrices, other matrices, and vectors (no weight decay).

    Args:
        masked: ids of the parameters with a sparsity state; a group of their own, so that ZeRO's
            flat tensors hold either only masked weights or none.
        ends: names of parameters with a learning rate of their own (the group `ends`).
    """
    groups: dict[str, list[torch.nn.Parameter]] = {}
    groups |= {name: [] for name in ("masked", "matrices", "vectors", "ends")}
    for name, parameter in named_parameters:
        if id(parameter) in masked:
            groups["masked"].append(parameter)
        elif name in ends:
            groups["ends"].append(parameter)
        else:
            groups["matrices" if parameter.dim() > 1 else "vectors"].append(parameter)
    return [
        {"params": params, "weight_decay": 0.0 if name == "vectors" else weight_decay, "name": name}
        for name, params in groups.items()
        if params
    ]
