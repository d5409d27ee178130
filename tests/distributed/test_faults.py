"""Faults strike where they are to; the code that they strike does not know of them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from megasparse.distributed.faults import Faults, parse

PACKAGE = Path(__file__).parents[2] / "megasparse"


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
