"""Mutants: every one is another program, and its judges are the tests that execute its line."""

from __future__ import annotations

import ast
import json
import sys
import types

import pytest

from tools.bench.mutation import forks, judge, places
from tools.bench.mutation.executed import Tracer, follow, load_map, replace, unfollowed
from tools.bench.mutation.places import Mutant, mutants_of, surroundings
from tools.bench.mutation.workers import Worker, ask

SOURCE = """
@dataclass(frozen=True)
class A:
    ok = 5 if zip(a, b, strict=True) else 6

def f(x: int = 3, *, deep: bool = True) -> int:
    assert x > 0, "é"
    if x <= 2 and not deep:
        raise ValueError("a" + "b")
    g(x)
    return "é", -x + 1
"""


def test_mutants_are_programs_that_differ_in_one_place():
    found = mutants_of("m.py", SOURCE)
    assert [(m.line, m.old, m.new) for m in found] == [
        (4, "5", "6"),
        (4, "6", "7"),
        (6, "3", "4"),
        (6, "True", "False"),
        (8, "x <= 2 and not deep", "(x <= 2) or (not deep)"),
        (8, "x <= 2", "(x) < (2)"),
        (8, "2", "3"),
        (8, "not deep", "(deep)"),
        (10, "g(x)", "pass"),
        (11, "-x + 1", "(-x) - (1)"),
        (11, "-x", "(x)"),
        (11, "1", "2"),
    ]
    for mutant in found:
        changed = SOURCE[: mutant.start] + mutant.new + SOURCE[mutant.end :]
        assert SOURCE[mutant.start : mutant.end] == mutant.old
        assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(SOURCE))


WHERE = """
LIMIT = 3

class A:
    size: int = 2

    @property
    def small(self):
        if self.size < 3 and \\
                self.size > 0:
            return (self.size
                    + 1)
        return 0


def outer(x=5):
    def inner():
        return x - 1
    return inner()
"""


def _at(old: str, source: str = WHERE) -> Mutant:
    start = source.index(old)
    return Mutant("m.py", source[:start].count("\n") + 1, start, start + len(old), old, "")


def test_surroundings_are_the_statement_and_the_outermost_function():
    def of(old):
        found = surroundings(WHERE, _at(old))
        return found.function, list(found.lines)

    assert of("3\n\nclass") == (None, [2])
    assert of("2\n\n    @") == (None, [5])
    assert of("self.size > 0") == (("small", 7), [9, 10])
    assert of("1)") == (("small", 7), [11, 12])
    assert of("5)") == (None, [16])  # a default is computed at import
    assert of("x - 1") == (("outer", 16), [18])


def test_functions_get_the_code_of_a_changed_source(tmp_path):
    path = tmp_path / "changed_here.py"
    path.write_text(WHERE)
    module = types.ModuleType("changed_here")
    exec(compile(WHERE, str(path), "exec"), module.__dict__)
    kept = module.outer  # someone else's reference
    judge._functions.cache_clear()
    for old, new, call in (("x - 1", "x + 1", kept), ("+ 1)", "+ 7)", lambda: module.A().small)):
        before = call()
        changed = WHERE.replace(old, new)
        judge.exchange(path, changed, _at(old))()
        assert call() == before + {"x - 1": 2, "+ 1)": 6}[old]
    assert judge.exchange(path, WHERE, _at("3\n\nclass")) is None
    assert judge.exchange(path, "\n" + WHERE, _at("x - 1")) is None


SHORT = "def f(x):\n    if x:\n        return 1\n    return 2\n"


def test_lines_are_those_that_a_test_executes(tmp_path):
    folder = tmp_path / "megasparse" / "sparsity"
    traced = types.ModuleType("traced")
    exec(compile(SHORT, str(folder / "traced.py"), "exec"), traced.__dict__)
    tracer = Tracer(tmp_path, tmp_path / "log")
    known = sys.gettrace()
    try:
        tracer.start()
        for name, value in (("a", 1), ("b", 0), ("a", 0)):
            tracer.name(name)
            traced.f(value)
    finally:
        sys.settrace(known)
        tracer.stop()
    rows = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    found = {test: sorted({n for t, m, n in rows if t == test}) for test in "ab"}
    assert found == {"a": [2, 3, 4], "b": [2, 4]}
    assert {module for _, module, _ in rows} == {"megasparse/sparsity/traced.py"}


def test_a_mutant_is_judged_by_the_quickest_tests_that_reach_it(tmp_path):
    module = "megasparse/sparsity/schedule.py"
    text = (places.ROOT / module).read_text()
    found = mutants_of(module, text)
    mutant = next(one for one in found if "interval" in one.old)
    signature = text[: text.index("first_sparse_step: int = 0")].count("\n") + 1
    default = next(one for one in found if one.line == signature and one.new == "1")
    lines = {module: [mutant.line]}
    tests = {
        "slow": {"seconds": 5.0, "lines": lines},
        "quick": {"seconds": 0.1, "lines": lines},
        "elsewhere": {"seconds": 0.1, "lines": {module: [1]}},
        "other": {"seconds": 0.1, "lines": {"megasparse/sparsity/state.py": [mutant.line]}},
    }
    assert judge.Judge(tmp_path, tests, 60.0).reached_by(mutant) == ["quick", "slow"]
    assert judge.Judge(tmp_path, tests, 1.0).reached_by(mutant) == ["quick"]
    near = {
        "tests/train/test_runs.py::a": {"seconds": 0.1, "lines": lines},
        "tests/sparsity/test_state.py::b": {"seconds": 2.0, "lines": lines},
        "tests/sparsity/test_schedule_of_phases.py::c": {"seconds": 3.0, "lines": lines},
    }
    order = judge.Judge(tmp_path, near, 60.0).reached_by(mutant)
    assert [test[-1] for test in order] == ["a", "c", "b"]  # the quick; of the module, its folder
    # One that takes too long leaves its time to others.
    order = judge.Judge(tmp_path, near, 2.5).reached_by(mutant)
    assert [test[-1] for test in order] == ["a", "b"]
    for one in near.values():
        one["seconds"] /= 10
    order = judge.Judge(tmp_path, near, 60.0).reached_by(mutant)
    assert [test[-1] for test in order] == ["c", "b", "a"]  # of the module, of its folder, others
    assert surroundings((places.ROOT / module).read_text(), default).function is None
    by_time = ["quick", "elsewhere", "slow"]
    # What runs at import: whoever executes anything of the module, and the tests of its folder.
    assert judge.Judge(tmp_path, tests, 60.0).reached_by(default) == by_time
    beside = {f"tests/{f}/test_it.py::x": {"seconds": 0.1, "lines": {}} for f in ("sparsity", "a")}
    assert judge.Judge(tmp_path, beside, 60.0).reached_by(default) == [
        "tests/sparsity/test_it.py::x"
    ]
    assert judge.Judge(tmp_path, beside, 60.0).reached_by(mutant) == []


def test_a_fault_at_import_is_noticed_and_gone_when_the_test_runs_alone(tmp_path, monkeypatch):
    """A test that sees the fault fails with it, and passes alone: the file is as it was then."""
    module = "megasparse/sparsity/schedule.py"
    text = (places.ROOT / module).read_text()
    mutant = next(
        one
        for one in mutants_of(module, text)
        if surroundings(text, one).function is None and one.new == "1"
    )
    path = tmp_path / module
    path.parent.mkdir(parents=True)
    path.write_text(text)
    seen = []

    def run(folder, tests, limit, prepare):
        seen.append((tests, path.read_text() == text))
        fails = not seen[-1][1] and "sharp" in tests
        return forks.Outcome("failed", "sharp") if fails else forks.Outcome("passed")

    monkeypatch.setattr(judge, "run", run)
    tests = {"blunt": {"seconds": 0.1, "lines": {module: [1]}}}
    one = judge.Judge(tmp_path, tests, 60.0)
    assert one.judge(mutant, imported=False) == ("survived", "") and path.read_text() == text
    tests["sharp"] = {"seconds": 0.2, "lines": {module: [1]}}
    assert one.judge(mutant, imported=False) == ("noticed", "sharp") and path.read_text() == text
    both = ["blunt", "sharp"]
    assert seen == [(["blunt"], False), (both, False), (["sharp"], False), (["sharp"], True)]


FIXTURES = """
import pytest
from megasparse.sparsity import traced

@pytest.fixture(scope="module")
def one():
    return traced.f(1)

def test_first(one):
    assert one == 1

def test_second(one):
    assert traced.f(0) == 2

def test_third():
    pass

def test_wrong():
    assert traced.f(1) == 2
"""


def test_what_a_modules_fixture_executes_belongs_to_all_that_use_it(tmp_path, monkeypatch):
    module = tmp_path / "megasparse" / "sparsity" / "traced.py"
    module.parent.mkdir(parents=True)
    module.write_text(SHORT)
    traced = types.ModuleType("megasparse.sparsity.traced")
    exec(compile(SHORT, str(module), "exec"), traced.__dict__)
    monkeypatch.setitem(sys.modules, traced.__name__, traced)
    monkeypatch.setattr("megasparse.sparsity.traced", traced, raising=False)
    monkeypatch.setattr(forks, "_fork_ranks", lambda: None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "test_them.py").write_text(FIXTURES)
    found = follow(tmp_path, "test_them.py", 60.0)
    name = "megasparse/sparsity/traced.py"
    lines = {test.split("::")[1]: one["lines"] for test, one in found.items()}
    assert lines == {
        "test_first": {name: [2, 3]},
        "test_second": {name: [2, 3, 4]},
        "test_third": {},
    }
    known = load_map(tmp_path / "map.json")
    assert unfollowed(known, tmp_path, ["test_them.py"]) == ["test_them.py"]
    replace(known, tmp_path, "test_them.py", found)
    assert unfollowed(known, tmp_path, ["test_them.py"]) == []
    replace(known, tmp_path, "test_them.py", {})
    assert known["tests"] == {}


def test_workers_answer_in_order_and_within_the_time():
    even, odd = Worker(lambda n: (n, "even")), Worker(lambda n: (n, "odd"))
    answers: list[tuple[int, str]] = []

    def told(question, answer):
        assert question == answer[0]
        answers.append(answer)

    def fits(question, worker):
        return (worker is odd) == bool(question % 2)

    try:
        ask([even, odd], range(6), told, 1, fits)
        assert answers == [(n, "odd" if n % 2 else "even") for n in range(6)]
        ask([even, odd], [7, 8], told, 2, fits, until=0.0)
        assert len(answers) == 6
    finally:
        even.end()
        odd.end()


def test_a_worker_that_fails_ends_the_work():
    worker = Worker(lambda n: 1 // n)
    with pytest.raises(SystemExit, match="ZeroDivisionError"):
        ask([worker], [1, 0], lambda *_: None, 1)
    worker.end()
