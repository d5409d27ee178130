"""Whole steps: what a log step costs is of measured steps alone, and stands in the table."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tools.bench import train
from tools.bench.parts.profiling import Profile


def test_log_steps_are_measured_and_read(monkeypatch):
    """Those after the warm-up count, from asking to reading."""
    clock, asked, order = [0.0], [], []
    controller = SimpleNamespace(sparse_now=True, ask=asked.append)
    engine = SimpleNamespace(controller=controller)

    def step():
        order.append("step" if asked[-1] else "plain step")
        clock[0] += 100.0 if len(order) <= 2 * train.LOG_WARMUP else 2.0

    def measure_all(of, sparse, more, largest):
        assert of is engine and sparse and not asked[-1]
        order.append("read")
        clock[0] += 1.0

    monkeypatch.setattr(train.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(train.layer_metrics, "measure_all", measure_all)
    assert train.log_step_seconds(engine, step, 5) == 3.0
    assert order == ["step", "read"] * (train.LOG_WARMUP + 5)
    assert asked == [True, False] * (train.LOG_WARMUP + 5)


@pytest.mark.parametrize("logged", [False, True])
def test_the_table_has_log_steps_where_they_were_timed(monkeypatch, logged):
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr(train.torch.cuda, "get_device_name", lambda: "a GPU")
    result = {"loss": 2.0, "tokens_per_second": 1000.0, "parameters": 1e9, "memory": 1.0}
    if logged:
        result["log_step"] = 0.0305
    text = train.report({"dense": (result, Profile(seconds=0.028))}, [], 1)
    head, _, row, *_ = (line for line in text.splitlines() if line.startswith("|"))
    cells = dict(zip(*([c.strip() for c in line.split("|")] for line in (head, row)), strict=True))
    assert cells["ms a step"] == "28.0"
    assert cells.get("ms a log step") == ("30.5" if logged else None)
