"""The learning rate: shapes, ends, and no state."""

from __future__ import annotations

import math

import pytest

from megasparse.config import TrainConfig
from megasparse.optim.lr import learning_rate


def _train(**values):
    return TrainConfig(**{"lr": 1.0, "min_lr": 0.1, "lr_decay_iters": 110, **values})


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
