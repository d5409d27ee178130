"""How long a run is and how large its batches are, in optimizer steps or in samples.

Megatron's rules. With `rampup_batch_size START INCREMENT SAMPLES` the batch grows from START by
INCREMENT at a time over the first SAMPLES samples: it follows from the samples consumed so far.
With `train_samples` the run ends with the last whole step within them, and the learning rate's
schedule is in samples too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from megasparse.config.schema.training import TrainConfig

DEFAULT_ITERS = 100


class Rampup(NamedTuple):
    """Sequences of the first step, how many more at a time, and the samples over which."""

    start: int
    increment: int
    samples: int


class LrSchedule(NamedTuple):
    """Where the learning rate turns, all in optimizer steps or all in samples.

    Attributes:
        end: of the run.
        decay: where the decay ends.
        warmup, wsd_decay, linear_to_zero: lengths of the warm-up, of WSD's decay (None: another
            style), of the last stretch.
    """

    end: int
    decay: int
    warmup: int
    wsd_decay: int | None
    linear_to_zero: int


def lr_schedule(train: TrainConfig) -> LrSchedule:
    """Of resolved settings."""
    if train.train_samples is not None:
        assert train.lr_decay_samples is not None
        return LrSchedule(
            train.train_samples,
            train.lr_decay_samples,
            train.lr_warmup_samples,
            train.lr_wsd_decay_samples,
            train.lr_linear_to_zero_samples,
        )
    assert train.train_iters is not None and train.lr_decay_iters is not None
    return LrSchedule(
        train.train_iters,
        train.lr_decay_iters,
        train.lr_warmup_iters,
        train.lr_wsd_decay_iters,
        train.lr_linear_to_zero_iters,
    )


def batch_size(train: TrainConfig, consumed: int) -> int:
    """Sequences of the step that begins when `consumed` have been trained on."""
    assert train.global_batch_size is not None
    ramp = _rampup(train)
    if ramp is None or consumed >= ramp.samples:
        return train.global_batch_size
    return ramp.start + consumed * _increments(train, ramp) // ramp.samples * ramp.increment


def steps_within(train: TrainConfig, consumed: int, samples: int) -> int:
    """Whole steps from `consumed` samples on, until no other fits into `samples`."""
    steps = 0
    for first, size, count in _levels(train, consumed):
        fit = max(samples - first, 0) // size
        if count is None or fit < count:
            return steps + fit
        steps += count
    raise AssertionError("the last level has no end")


def samples_after(train: TrainConfig, steps: int, consumed: int = 0) -> int:
    """Samples consumed after `steps` steps from `consumed` on."""
    for first, size, count in _levels(train, consumed):
        if count is None or steps <= count:
            return first + steps * size
        steps -= count
    raise AssertionError("the last level has no end")


def _levels(train: TrainConfig, consumed: int) -> Iterator[tuple[int, int, int | None]]:
    """Steps of one size after the other: samples before the first, size, count (None: no end)."""
    ramp = _rampup(train)
    while ramp is not None and consumed < ramp.samples:
        increments = _increments(train, ramp)
        following = consumed * increments // ramp.samples + 1
        # The first number of samples at which the size is the next one.
        until = -(-following * ramp.samples // increments)
        size = batch_size(train, consumed)
        count = -(-(until - consumed) // size)
        yield consumed, size, count
        consumed += count * size
    yield consumed, batch_size(train, consumed), None


def _increments(train: TrainConfig, ramp: Rampup) -> int:
    assert train.global_batch_size is not None
    return (train.global_batch_size - ramp.start) // ramp.increment


def _rampup(train: TrainConfig) -> Rampup | None:
    """Of checked settings; None: every batch is of the global size."""
    if train.rampup_batch_size is None:
        return None
    ramp = Rampup(*(int(number) for number in train.rampup_batch_size))
    return None if ramp.start == train.global_batch_size else ramp


def fill_train(train: TrainConfig, per_step: int) -> None:
    """Fill in the batch, the length of the run and that of its schedule, where they are unset.

    Args:
        per_step: sequences of one micro-batch over all data-parallel ranks.
    """
    train.global_batch_size = train.global_batch_size or max(per_step, 1)
    fraction = train.lr_warmup_fraction
    if train.train_samples is None:
        train.train_iters = train.train_iters or DEFAULT_ITERS
        if train.lr_decay_iters is None:
            train.lr_decay_iters = max(train.train_iters - train.lr_linear_to_zero_iters, 1)
        if fraction is not None and not train.lr_warmup_iters:
            train.lr_warmup_iters = int(fraction * train.lr_decay_iters)
        return
    if train.train_iters is None:
        known = next(rampup_problems(train, per_step), None) is None
        train.train_iters = steps_within(train, 0, train.train_samples) if known else 0
    if train.lr_decay_samples is None:
        train.lr_decay_samples = max(train.train_samples - train.lr_linear_to_zero_samples, 1)
    if fraction is not None and not train.lr_warmup_samples:
        train.lr_warmup_samples = int(fraction * train.lr_decay_samples)


def rampup_problems(train: TrainConfig, per_step: int) -> Iterator[str]:
    """What is wrong with a ramp-up: it has a step that the ranks cannot divide, or no such numbers.

    Args:
        per_step: sequences of one micro-batch over all data-parallel ranks.
    """
    given, batch = train.rampup_batch_size, train.global_batch_size
    if given is None or batch is None:
        return
    shown = " ".join(given)
    if len(given) != 3 or not all(number.isdecimal() for number in given):
        yield (
            f"rampup_batch_size {shown!r}, expected three whole numbers: the first batch, its "
            "increment, and the samples over which it grows"
        )
        return
    ramp = Rampup(*(int(number) for number in given))
    if ramp.start > batch or min(ramp) < 1 or (batch - ramp.start) % ramp.increment:
        yield (
            f"rampup_batch_size {shown}, expected positive numbers that lead from {ramp.start} by "
            f"steps of {ramp.increment} to global_batch_size {batch}"
        )
        return
    uneven = per_step and (ramp.start % per_step or ramp.increment % per_step)
    if ramp.start < batch and uneven:
        yield (
            f"rampup_batch_size {shown}, expected multiples of micro_batch_size x data parallel "
            f"size, {per_step}"
        )


def check_train(given: TrainConfig, train: TrainConfig, per_step: int) -> Iterator[str]:
    """What is wrong with lengths and schedules.

    Args:
        given: as loaded; `train`: resolved.
        per_step: sequences of one micro-batch over all data-parallel ranks.
    """
    of_batches = list(rampup_problems(train, per_step))
    yield from of_batches
    unit, other = ("samples", "iters") if train.train_samples is not None else ("iters", "samples")
    for name in ("lr_decay", "lr_warmup", "lr_wsd_decay", "lr_linear_to_zero"):
        if value := getattr(given, f"{name}_{other}"):
            yield (
                f"{name}_{other} {value} in a run whose length is train_{unit}, expected "
                f"{name}_{unit}"
            )
    if train.train_samples is not None and not of_batches:
        yield from _check_samples(given, train)
    yield from _check_turns(given, train, unit)


def _check_samples(given: TrainConfig, train: TrainConfig) -> Iterator[str]:
    assert train.train_samples is not None
    steps = steps_within(train, 0, train.train_samples)
    if not steps:
        yield (
            f"train_samples {train.train_samples}, expected at least one batch of "
            f"{batch_size(train, 0)}"
        )
    # A configuration that was written by a run has both.
    elif given.train_iters is not None and given.train_iters != steps:
        yield (
            f"train_iters {given.train_iters} and train_samples {train.train_samples} (which are "
            f"{steps} steps) are both set, expected one"
        )


def _check_turns(given: TrainConfig, train: TrainConfig, unit: str) -> Iterator[str]:
    found, style = lr_schedule(train), train.lr_decay_style
    wanted = given.lr_warmup_fraction
    warmup = getattr(given, f"lr_warmup_{unit}")
    if wanted is not None and warmup and warmup != int(wanted * found.decay):
        yield f"lr_warmup_{unit} and lr_warmup_fraction are both set, expected one"
    if found.warmup > found.decay:
        yield f"lr_warmup_{unit} {found.warmup} is more than lr_decay_{unit} {found.decay}"
    words = "steps" if unit == "iters" else unit
    if style == "WSD" and found.wsd_decay is None:
        yield f"lr_decay_style WSD needs lr_wsd_decay_{unit}, the {words} of its decay"
    if found.wsd_decay is not None and style != "WSD":
        yield f"lr_wsd_decay_{unit} {found.wsd_decay} with lr_decay_style {style}, expected WSD"
    longest = found.decay - found.warmup
    if found.wsd_decay is not None and found.wsd_decay > longest:
        yield (
            f"lr_wsd_decay_{unit} {found.wsd_decay}, expected at most the {longest} {words} "
            f"between lr_warmup_{unit} and lr_decay_{unit}"
        )
    if found.linear_to_zero > found.end - found.warmup:
        yield (
            f"lr_linear_to_zero_{unit} {found.linear_to_zero}, expected at most the "
            f"{found.end - found.warmup} {words} after lr_warmup_{unit}"
        )


# Positions of a sequence among which experts' tokens are grouped for MVUE.
MOST_SEGMENT, FEWEST_SEGMENTS = 256, 8


def expert_segment(sequence: int) -> int:
    """Positions whose tokens are grouped for MVUE at an expert: a part of the sequence, which ranks
    of context parallelism do not cut; the whole where its length is no multiple of 64.

    Args:
        sequence: tokens of a sequence.
    """
    power = sequence & -sequence
    if power < FEWEST_SEGMENTS * FEWEST_SEGMENTS:
        return sequence
    return min(MOST_SEGMENT, power // FEWEST_SEGMENTS)
