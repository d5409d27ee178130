"""Mutants: every one is another program, and its judges are the tests that mirror its module."""

from __future__ import annotations

import ast

from tools.bench import mutants

SOURCE = """
def f(x: int = 3, *, deep: bool = True) -> int:
    assert x > 0, "é"
    if x <= 2 and not deep:
        raise ValueError("a" + "b")
    g(x)
    return "é", -x + 1
"""


def test_mutants_are_programs_that_differ_in_one_place():
    found = mutants._Places("m.py", SOURCE).found
    assert [(m.line, m.old, m.new) for m in found] == [
        (2, "3", "4"),
        (2, "True", "False"),
        (4, "x <= 2 and not deep", "(x <= 2) or (not deep)"),
        (4, "x <= 2", "(x) < (2)"),
        (4, "2", "3"),
        (4, "not deep", "(deep)"),
        (6, "g(x)", "pass"),
        (7, "-x + 1", "(-x) - (1)"),
        (7, "-x", "(x)"),
        (7, "1", "2"),
    ]
    for mutant in found:
        changed = SOURCE[: mutant.start] + mutant.new + SOURCE[mutant.end :]
        assert SOURCE[mutant.start : mutant.end] == mutant.old
        assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(SOURCE))


def test_a_module_is_judged_by_its_own_tests_or_by_those_of_its_folder():
    assert mutants.judges("megasparse/sparsity/state.py") == ["tests/sparsity/test_state.py"]
    folder = mutants.judges("megasparse/sparsity/probe.py")
    assert "tests/sparsity/test_wanda.py" in folder and len(folder) > 3
    assert len({mutant.module.split("/")[1] for mutant in mutants.mutants()}) == 5
