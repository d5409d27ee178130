"""The learning rate: shapes, ends, and no state."""

from __future__ import annotations

import math

import pytest
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megasparse.config import TrainConfig
from megasparse.config.batches import samples_after
from megasparse.optim.lr import decoupled, learning_rate


def _train(**values):
    return TrainConfig(
        **{"lr": 1.0, "min_lr": 0.1, "lr_decay_iters": 110, "train_iters": 100, **values}
    )


def test_warmup_is_linear_and_ends_at_the_peak():
    train = _train(lr_warmup_iters=10)
    assert [learning_rate(train, s) for s in (0, 4, 9)] == [0.1, 0.5, 1.0]
    assert learning_rate(train, 10) == 1.0


@pytest.mark.parametrize(
    ("style", "middle"),
    [
        ("constant", 1.0),
        ("linear", 0.55),
        ("cosine", 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 2))),
    ],
)
def test_shapes(style, middle):
    train = _train(lr_warmup_iters=10, lr_decay_style=style)
    assert learning_rate(train, 60) == pytest.approx(middle)
    end = 1.0 if style == "constant" else 0.1
    assert learning_rate(train, 110) == learning_rate(train, 10**6) == pytest.approx(end)


def _megatron(train, step):
    """What Megatron-core's scheduler gives after `step` steps."""
    scheduler = OptimizerParamScheduler.__new__(OptimizerParamScheduler)
    scheduler.max_lr, scheduler.min_lr, scheduler.init_lr = train.lr, train.min_lr, 0.0
    scheduler.lr_warmup_steps = train.lr_warmup_iters
    scheduler.lr_decay_steps = train.lr_decay_iters
    scheduler.lr_decay_style, scheduler.num_steps = train.lr_decay_style, step
    scheduler.wsd_decay_steps = train.lr_wsd_decay_iters
    scheduler.lr_wsd_decay_style = train.lr_wsd_decay_style
    return scheduler.get_lr({})


@pytest.mark.parametrize("warmup", [0, 10])
@pytest.mark.parametrize(
    ("style", "wsd"),
    [
        ("constant", {}),
        ("linear", {}),
        ("cosine", {}),
        ("inverse-square-root", {}),
        *(
            ("WSD", {"lr_wsd_decay_iters": 30, "lr_wsd_decay_style": shape})
            for shape in ("exponential", "linear", "cosine", "minus_sqrt")
        ),
    ],
)
def test_every_shape_is_megatrons(style, wsd, warmup):
    train = _train(lr_warmup_iters=warmup, lr_decay_style=style, **wsd)
    for step in range(warmup, 130):
        if step != train.lr_decay_iters:  # there Megatron's inverse square root has one step more
            assert learning_rate(train, step) == pytest.approx(_megatron(train, step), abs=1e-12)


@pytest.mark.parametrize("style", ["cosine", "constant", "WSD"])
def test_the_last_stretch_is_linear_to_zero(style):
    train = _train(
        lr_decay_style=style, lr_wsd_decay_iters=20, train_iters=120, lr_linear_to_zero_iters=10
    )
    without = _train(lr_decay_style=style, lr_wsd_decay_iters=20, train_iters=120)
    for step in range(111):
        assert learning_rate(train, step) == learning_rate(without, step)
    start = learning_rate(train, 110)
    for step in range(110, 121):
        assert learning_rate(train, step) == pytest.approx(start * (120 - step) / 10)


@pytest.mark.parametrize("style", ["linear", "cosine", "inverse-square-root"])
def test_where_the_decay_ends_the_rate_is_the_lowest(style):
    train = _train(lr_decay_style=style, lr_warmup_iters=10)
    rates = [learning_rate(train, step) for step in (109, 110, 111)]
    assert rates[0] > rates[1] == rates[2] == 0.1


def _in_samples(**values):
    return TrainConfig(
        lr=1.0,
        min_lr=0.0,
        lr_decay_style="linear",
        train_samples=200,
        lr_decay_samples=180,
        lr_warmup_samples=20,
        lr_linear_to_zero_samples=0,
        global_batch_size=8,
        **values,
    )


def test_a_schedule_in_samples_follows_the_samples():
    """A step's warm-up counts its own batch; a batch that was changed is told."""
    train = _in_samples()
    rates = [learning_rate(train, step) for step in range(4)]
    assert rates == pytest.approx([0.4, 0.8, 1.0, (180 - 24) / 160])
    assert learning_rate(train, 3, consumed=12) == pytest.approx(1.0)
    assert learning_rate(train, 3, consumed=4) == pytest.approx(12 / 20)
    ramp = _in_samples(rampup_batch_size=("2", "2", "12"))
    for step in range(8):
        done = samples_after(ramp, step)
        batch = samples_after(ramp, step + 1) - done
        rate = min(done + batch, 20) / 20 if done < 20 else (180 - done) / 160
        assert learning_rate(ramp, step) == pytest.approx(rate)


def test_the_ends_have_a_schedule_of_their_own_if_it_is_asked_for():
    train = _train()
    assert decoupled(train) is train
    rates = [
        decoupled(_train(**more))
        for more in ({"decoupled_lr": 3.0}, {"decoupled_lr": 3.0, "decoupled_min_lr": 0.5})
    ]
    assert [(one.lr, one.min_lr) for one in rates] == [(3.0, 0.1), (3.0, 0.5)]
