"""The learning rate as a pure function of the step (Megatron's shapes)."""

from __future__ import annotations

import math

from megasparse.config import ResolvedTrain


def learning_rate(train: ResolvedTrain, step: int) -> float:
    """Learning rate of optimizer step `step` (0 is the first).

    Linear from 0 over `lr_warmup_iters` (the first step already moves: (step + 1) / warm-up), then
    from `lr` to `min_lr` over the rest of `lr_decay_iters` by the chosen shape, then `min_lr`.
    """
    if step < train.lr_warmup_iters:
        return train.lr * (step + 1) / train.lr_warmup_iters
    if train.lr_decay_style == "constant":
        return train.lr
    if step >= train.lr_decay_iters:
        return train.min_lr
    span = train.lr_decay_iters - train.lr_warmup_iters
    progress = (step - train.lr_warmup_iters) / span
    shape = 1.0 - progress
    if train.lr_decay_style == "cosine":
        shape = 0.5 * (1.0 + math.cos(math.pi * progress))
    return train.min_lr + shape * (train.lr - train.min_lr)
