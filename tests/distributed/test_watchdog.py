"""What the watchdog makes of the points that a rank passes."""

from __future__ import annotations

import pytest

from megasparse.distributed.watchdog import PHASES, Watchdog


@pytest.mark.parametrize(
    ("point", "phase"),
    [
        ("micro_batch", "step 7, micro-batch 2"),
        ("backward", "step 7, backward of micro-batch 2"),
        ("evaluate", "evaluation, micro-batch 2"),
        ("save", "save of step 6"),
        ("save:rename", "save:rename"),
        ("report", "final report"),
    ],
)
def test_the_watchdog_says_what_begins(tmp_path, point, phase):
    watch = Watchdog(None, "", 0, 1, 60.0, tmp_path)
    watch.passed(point, 6, 2)
    watch.passed("data", 6, 2)  # within the micro-batch: no phase of its own
    beat = watch._beat()
    assert beat["phase"] == phase and beat["ticks"] == 1


def test_no_phase_may_take_for_ever(tmp_path, monkeypatch):
    watch = Watchdog(None, "", 0, 1, 0.001, tmp_path)
    late = {}
    for point in (*PHASES, "save:sync"):
        watch.passed(point, 0)
        watch._ticked -= 3600.0
        late[point] = watch._beat()["late"]
    assert late == dict.fromkeys(late, True) and len(late) > 10


@pytest.mark.parametrize(
    ("point", "allowance"),
    [("micro_batch", 1.0), ("backward", 1.0), ("save", 5.0), ("save:sync", 5.0), ("report", 20.0)],
)
def test_slow_phases_have_their_allowance(tmp_path, point, allowance):
    limit = 100.0
    watch = Watchdog(None, "", 0, 1, limit, tmp_path)
    watch.passed("build", 0)  # what was allowed before does not stay
    watch.passed(point, 0)
    began = watch._ticked
    watch._ticked = began - 0.9 * limit * allowance
    assert not watch._beat()["late"]
    watch._ticked = began - 1.1 * limit * allowance
    beat = watch._beat()
    assert beat["late"] and beat["late_for"] == pytest.approx(0.1 * limit * allowance, abs=5.0)
    assert beat["seconds"] == pytest.approx(1.1 * limit * allowance, abs=5.0)
    without = Watchdog(None, "", 0, 1, 0.0, tmp_path)
    without.passed(point, 0)
    without._ticked -= 1e6
    assert not without._beat()["late"]
