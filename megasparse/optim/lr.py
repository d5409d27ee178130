"""The learning rate as a function of the step, or of the samples before it (Megatron's shapes)."""

from __future__ import annotations

import dataclasses
import math

from megasparse.config import ResolvedTrain
from megasparse.config.batches import LrSchedule, batch_size, lr_schedule, samples_after


def learning_rate(train: ResolvedTrain, step: int, consumed: int | None = None) -> float:
    """Learning rate of optimizer step `step` (0 is the first).

    Linear from 0 over the warm-up (the first step already moves: by what is done after it), then
    from `lr` to `min_lr` until the end of the decay by the chosen shape, then `min_lr`. In the last
    stretch (`lr_linear_to_zero_iters`) it falls from where it was to 0, which it would have after
    the last step. A run of `train_samples` has its schedule in samples.

    Args:
        consumed: samples before the step; default: of a run whose batch has not been changed.
    """
    turns = lr_schedule(train)
    done, after = step, step + 1
    if train.train_samples is not None:
        done = samples_after(train, step) if consumed is None else consumed
        after = min(done + batch_size(train, done), turns.warmup)
    last = turns.linear_to_zero
    start = turns.end - last
    if last and done >= start:
        # The warm-up is over where the stretch begins (`check_train`).
        return _decayed(train, turns, start, start) * max(turns.end - done, 0) / last
    return _decayed(train, turns, done, after)


def decoupled(train: ResolvedTrain) -> ResolvedTrain:
    """The schedule of word embedding and output layer: the same shape between their rates."""
    if train.decoupled_lr is None:
        return train
    low = train.min_lr if train.decoupled_min_lr is None else train.decoupled_min_lr
    return dataclasses.replace(train, lr=train.decoupled_lr, min_lr=low)


def _decayed(train: ResolvedTrain, turns: LrSchedule, done: int, after: int) -> float:
    """By warm-up and decay alone.

    Args:
        done, after: before and after the step, in the unit of the schedule.
    """
    if done < turns.warmup:
        return train.lr * after / turns.warmup
    if train.lr_decay_style == "constant":
        return train.lr
    if done >= turns.decay:
        return train.min_lr
    if train.lr_decay_style == "inverse-square-root":
        shrunk = train.lr * math.sqrt(max(turns.warmup, 1) / max(done, 1))
        return max(train.min_lr, shrunk)
    return train.min_lr + _coefficient(train, turns, done) * (train.lr - train.min_lr)


def _coefficient(train: ResolvedTrain, turns: LrSchedule, done: int) -> float:
    """What is left of the decay between warm-up and its end, from 1 to 0."""
    if train.lr_decay_style != "WSD":
        return _shape(train.lr_decay_style, (done - turns.warmup) / (turns.decay - turns.warmup))
    assert turns.wsd_decay is not None
    into = max(done - (turns.decay - turns.wsd_decay), 0)
    return _shape(train.lr_wsd_decay_style, into / turns.wsd_decay)


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
