"""The bar of a start's first step counts every pass of it, in both layouts' order of events."""

from __future__ import annotations

import io

import pytest

from megasparse.train import first_step
from megasparse.train.first_step import FirstStepBar

PLAIN = [
    (point, micro_batch)
    for micro_batch in range(3)
    for point in ("micro_batch", "data", "forward", "backward")
] + [("optimizer", 2), ("step_end", 0)]
# One forward one backward, of a first stage: its backward passes begin late.
PIPELINE = [
    *(("micro_batch", 0), ("forward", 0), ("micro_batch", 1), ("forward", 1), ("backward", 0)),
    *(("micro_batch", 2), ("forward", 2), ("backward", 1), ("backward", 2)),
    *(("optimizer", 0), ("step_end", 0)),
]


@pytest.mark.parametrize("events", [PLAIN, PIPELINE])
def test_the_bar_ends_full_and_is_gone_at_the_second_step(monkeypatch, events):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setattr(first_step, "is_logging_rank", lambda: True)
    bars = []
    make = first_step.progress
    monkeypatch.setattr(first_step, "progress", lambda **how: bars.append(make(**how)) or bars[-1])
    bar = FirstStepBar(3)
    for point, micro_batch in [("build", 0), ("first_step", 0), *events, *events]:
        bar(point, 0, micro_batch)
    assert len(bars) == 1 and bars[0].n == bars[0].total == 7
    assert "first step" in screen.getvalue()
