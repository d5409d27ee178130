"""The definition of AdamW with a masked decay, in plain torch."""

from __future__ import annotations

import math

import torch


def masked_adamw(
    weight: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    clip: float,
    decay: float,
    decoupled: bool,
    of_sign: bool = False,
    kept: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The new weight, m and v; see `megasparse.kernels.masked_adamw_`.

    The order of operations is that of torch's AdamW (`torch.optim.adamw`, one tensor at a time).
    """
    grad = grad * clip
    decays = mask is not None and (of_sign or decay != 0.0)
    size = weight.sign() if of_sign else weight
    term = size.masked_fill(mask, 0.0) * decay if decays and mask is not None else None
    if term is not None and not decoupled:
        grad = grad + term
    exp_avg = torch.lerp(exp_avg, grad, 1 - beta1)
    update = exp_avg
    if term is not None and decoupled and mask is not None:
        update = torch.where(mask, exp_avg, exp_avg * kept + term) if of_sign else exp_avg + term
    squared = update if term is not None and decoupled else grad
    exp_avg_sq = (exp_avg_sq * beta2).addcmul_(squared, squared, value=1 - beta2)
    denominator = exp_avg_sq.sqrt().div_(math.sqrt(1 - beta2**step)).add_(eps)
    weight = weight * (1 - lr * weight_decay)
    weight.addcdiv_(update, denominator, value=-lr / (1 - beta1**step))
    return weight, exp_avg, exp_avg_sq
