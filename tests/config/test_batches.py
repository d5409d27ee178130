"""Growing batches and lengths in samples: Megatron's numbers, and refusals that name them."""

from __future__ import annotations

import random

import pytest
from megatron.core import num_microbatches_calculator

from megasparse.config import TrainConfig, load_config, resolve
from megasparse.config.batches import batch_size, samples_after, steps_within
from megasparse.errors import ConfigError

# What the batches are compared with; megatron-core 0.16 has it, 0.19 has not.
MEGATRONS = getattr(num_microbatches_calculator, "RampupBatchsizeNumMicroBatchesCalculator", None)


def _cases():
    """GPT-3's own numbers, smaller ones by chance."""
    draw = random.Random(3)
    yield 1536, (16, 16, 5_859_375), 300_000_000
    for _ in range(40):
        start, increment = draw.randint(1, 9), draw.randint(1, 7)
        batch = start + increment * draw.randint(0, 8)
        yield batch, (start, increment, draw.randint(1, 400)), draw.randint(batch, 1500)


@pytest.mark.parametrize(("batch", "ramp", "samples"), _cases())
def test_batches_grow_as_megatrons(batch, ramp, samples):
    train = TrainConfig(global_batch_size=batch, rampup_batch_size=[str(n) for n in ramp])
    if batch == ramp[0]:
        assert batch_size(train, 0) == batch_size(train, samples) == batch
        assert steps_within(train, 0, samples) == samples // batch
        return
    if MEGATRONS is None:
        pytest.skip(
            "nothing to compare with: megatron-core lacks RampupBatchsizeNumMicroBatchesCalculator"
        )
    theirs = MEGATRONS(batch, 1, 1, False, 1, *ramp)
    consumed, steps = 0, 0
    while True:
        theirs.update(consumed, True)
        size = theirs.get_current_global_batch_size()
        assert batch_size(train, consumed) == size
        if consumed + size > samples or (samples > 10**6 and consumed > 2 * ramp[2]):
            break
        consumed, steps = consumed + size, steps + 1
    assert samples_after(train, steps) == consumed
    assert steps_within(train, 0, consumed) == steps
    assert steps_within(train, 0, consumed - 1) == steps - 1
    middle = samples_after(train, steps // 3)
    assert samples_after(train, steps - steps // 3, middle) == consumed
    assert steps_within(train, middle, samples) == steps_within(train, 0, samples) - steps // 3


def _resolved(*flags):
    base = ["--vocab-size", "64", "--mock-data", "--micro-batch-size", "2"]
    return resolve(load_config([*base, *flags]), 2).train


def test_a_length_in_samples_gives_the_steps_and_the_schedule():
    train = _resolved("--global-batch-size", "8", "--train-samples", "103")
    assert (train.train_iters, train.lr_decay_samples, train.lr_decay_iters) == (12, 103, None)
    ramp = ["--global-batch-size", "16", "--rampup-batch-size", "4", "4", "48"]
    length = ["--train-samples", "200", "--lr-linear-to-zero-samples", "20"]
    train = _resolved(*ramp, *length, "--lr-warmup-fraction", "0.1")
    # 4 sequences until 16, 8 until 32, 12 until 56 (48 is within a batch), 16 until 200.
    assert train.train_iters == 4 + 2 + 2 + 9
    assert (train.lr_decay_samples, train.lr_warmup_samples) == (180, 18)
    assert _resolved().train_iters == 100 and _resolved().lr_decay_iters == 100


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--rampup-batch-size", "4", "4"], "expected three whole numbers"),
        (["--rampup-batch-size", "4", "4", "x"], "expected three whole numbers"),
        (["--rampup-batch-size", "4", "8", "100"], "from 4 by steps of 8 to global_batch_size 8"),
        (["--rampup-batch-size", "12", "4", "100"], "to global_batch_size 8"),
        (["--rampup-batch-size", "4", "4", "0"], "expected positive numbers"),
        (["--rampup-batch-size", "2", "2", "100"], "multiples of micro_batch_size x data paral"),
        (["--train-samples", "7"], "expected at least one batch of 8"),
        (["--train-samples", "80", "--train-iters", "9"], "are both set, expected one"),
        (["--train-samples", "80", "--lr-warmup-iters", "9"], "expected lr_warmup_samples"),
        (["--train-samples", "80", "--lr-decay-iters", "9"], "expected lr_decay_samples"),
        (["--lr-decay-samples", "80"], "lr_decay_samples 80 in a run whose length is train_iters"),
        (["--train-samples", "80", "--lr-warmup-samples", "81"], "more than lr_decay_samples 80"),
        (["--train-samples", "80", "--lr-decay-style", "WSD"], "needs lr_wsd_decay_samples"),
        (
            ["--train-samples", "80", "--lr-linear-to-zero-samples", "81"],
            "at most the 80 samples after lr_warmup_samples",
        ),
        (
            ["--lr-warmup-fraction", "0.1", "--lr-warmup-iters", "3"],
            "lr_warmup_iters and lr_warmup_fraction are both set",
        ),
    ],
)
def test_refusals(flags, words):
    with pytest.raises(ConfigError, match=words):
        _resolved("--global-batch-size", "8", *flags)


def test_a_resolved_run_is_resolved_again():
    """The file that a run writes is a configuration."""
    for length in (["--train-samples", "80"], ["--train-iters", "90"]):
        config = load_config(["--vocab-size", "64", "--mock-data", "--lr-warmup-fraction", "0.1"])
        config = resolve(load_config(["--vocab-size", "64", "--mock-data", *length]), 1)
        assert resolve(config, 1) == config
