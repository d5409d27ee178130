"""The learning rate as a pure function of the step (Megatron's shapes)."""

from __future__ import annotations

import dataclasses
import math

from megasparse.config import ResolvedTrain


def learning_rate(train: ResolvedTrain, step: int) -> float:
    """Learning rate of optimizer step `step` (0 is the first).

    Linear from 0 over `lr_warmup_iters` (the first step already moves: (step + 1) / warm-up), then
    from `lr` to `min_lr` until step `lr_decay_iters` by the chosen shape, then `min_lr`. In the
    last `lr_linear_to_zero_iters` steps it falls from where it was to 0, which it would have after
    the last one.
    """
    last = train.lr_linear_to_zero_iters
    start = train.train_iters - last
    if last and step >= start:
        return _decayed(train, start) * max(train.train_iters - step, 0) / last
    return _decayed(train, step)


def decoupled(train: ResolvedTrain) -> ResolvedTrain:
    """The schedule of word embedding and output layer: the same shape between their rates."""
    if train.decoupled_lr is None:
        return train
    low = train.min_lr if train.decoupled_min_lr is None else train.decoupled_min_lr
    return dataclasses.replace(train, lr=train.decoupled_lr, min_lr=low)


def _decayed(train: ResolvedTrain, step: int) -> float:
    """By warm-up and decay alone."""
    if step < train.lr_warmup_iters:
        return train.lr * (step + 1) / train.lr_warmup_iters
    if train.lr_decay_style == "constant":
        return train.lr
    if step >= train.lr_decay_iters:
        return train.min_lr
    if train.lr_decay_style == "inverse-square-root":
        shrunk = train.lr * math.sqrt(max(train.lr_warmup_iters, 1) / max(step, 1))
        return max(train.min_lr, shrunk)
    return train.min_lr + _coefficient(train, step) * (train.lr - train.min_lr)


def _coefficient(train: ResolvedTrain, step: int) -> float:
    """What is left of the decay between warm-up and `lr_decay_iters`, from 1 to 0."""
    if train.lr_decay_style != "WSD":
        span = train.lr_decay_iters - train.lr_warmup_iters
        return _shape(train.lr_decay_style, (step - train.lr_warmup_iters) / span)
    assert train.lr_wsd_decay_iters is not None
    into = step - (train.lr_decay_iters - train.lr_wsd_decay_iters)
    return 1.0 if into <= 0 else _shape(train.lr_wsd_decay_style, into / train.lr_wsd_decay_iters)


def _shape(style: str, progress: float) -> float:
    """Megatron's shapes, from 1 at progress 0 to 0 at progress 1."""
    if style == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    if style == "exponential":
        return 2.0 * 0.5**progress - 1.0
    if style == "minus_sqrt":
        return 1.0 - math.sqrt(progress)
    assert style == "linear", style
    return 1.0 - progress
