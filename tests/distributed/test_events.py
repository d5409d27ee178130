"""Points of a run reach every listener in order; what each listener makes of them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from megasparse.distributed.events import NO_LISTENERS, Events
from megasparse.distributed.faults import Faults, parse
from megasparse.distributed.watchdog import PHASES, Watchdog

PACKAGE = Path(__file__).parents[2] / "megasparse"


def test_every_listener_is_called_in_order():
    heard = []
    events = Events(lambda *at: heard.append(("a", *at)), lambda *at: heard.append(("b", *at)))
    events("build")
    events("forward", 3, 1)
    assert heard == [
        ("a", "build", 0, 0),
        ("b", "build", 0, 0),
        ("a", "forward", 3, 1),
        ("b", "forward", 3, 1),
    ]
    NO_LISTENERS("forward", 3, 1)


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


def test_only_phases_without_a_limit_may_take_for_ever(tmp_path, monkeypatch):
    watch = Watchdog(None, "", 0, 1, 0.001, tmp_path)
    late = {}
    for point in (*PHASES, "save:sync"):
        watch.passed(point, 0)
        watch._ticked -= 3600.0
        late[point] = watch._beat()["late"]
    assert late == {point: point != "report" for point in late}


def test_a_fault_strikes_at_its_rank_step_and_point_once():
    faults = Faults(parse("exception@1:6:forward,exception@0:*:save:sync"), 1)
    faults.passed("forward", 5)
    faults.passed("backward", 6)
    faults.passed("save:sync", 6)
    with pytest.raises(RuntimeError, match="at forward"):
        faults.passed("forward", 6)
    faults.passed("forward", 6)


def test_no_module_but_the_start_of_a_run_knows_the_fault_injector():
    """`main` makes it a listener, and the checks of the settings read its variable."""
    users = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                names = {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
                if "megasparse.distributed.faults" in names:
                    users.add(str(path.relative_to(PACKAGE)))
    assert users == {"train/main.py", "preflight/settings.py"}
