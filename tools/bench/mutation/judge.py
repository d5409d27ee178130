"""Whether the tests that execute a mutant's line notice it.

In a fork of a process that has imported everything its function's code is exchanged. What runs at
import is judged by a process that imports anew, from a copy of the tree with the file changed.
"""

from __future__ import annotations

import functools
import gc
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megasparse.atomic_files import write_text
from tools.bench.mutation.forks import Outcome, import_everything, run
from tools.bench.mutation.places import ROOT, Mutant, surroundings

# Seconds of a test; longer ones of a module would leave no time for its folder's quick ones.
_QUICK = 1.0
# More seconds for a process that imports the project first: it may share its cores.
_IMPORTING = 240.0


class Judge:
    """Judges mutants of a copy of the tree.

    Args:
        folder: the copy.
        tests: what `executed.follow` found.
        budget: seconds of tests for one mutant, by what they took when they were followed.
    """

    def __init__(self, folder: Path, tests: dict[str, dict[str, Any]], budget: float) -> None:
        self._folder, self._tests, self._budget = folder, tests, budget
        self._sound: dict[str, bool] = {}

    def reached_by(self, mutant: Mutant) -> list[str]:
        """Tests that execute a mutant's statement, within the budget: those of less than a second
        first, and of these, as of the others, those of its module (by their file's name), then
        those of its folder, then the rest; the quickest first.

        What runs at import is judged by the tests that execute anything of its module, and by those
        of its folder: a table executes no line when it is read.
        """
        around = surroundings((ROOT / mutant.module).read_text(), mutant)
        found = []
        for test, one in self._tests.items():
            lines = one["lines"].get(mutant.module, ())
            if around.function is None:
                reached = bool(lines) or _distance(test, mutant.module) < 2
            else:
                reached = any(n in around.lines for n in lines)
            if reached:
                found.append(test)
        seconds = {test: self._tests[test]["seconds"] for test in found}
        found.sort(key=lambda t: (seconds[t] >= _QUICK, _distance(t, mutant.module), seconds[t]))
        left, chosen = self._budget, list[str]()
        for test in found:
            takes = seconds[test] + 0.02
            if not chosen or takes <= left:
                chosen.append(test)
                left -= takes
        return chosen

    def judge(self, mutant: Mutant, imported: bool) -> tuple[str, str]:
        """What becomes of a mutant, and the test that noticed it.

        Args:
            imported: the project is imported, so that a function's code is exchanged; else a file.

        Returns:
            ("noticed" | "survived" | "not reached", test)
        """
        tests = self.reached_by(mutant)
        if not tests:
            return "not reached", ""
        path = self._folder / mutant.module
        source = path.read_text()
        changed = source[: mutant.start] + mutant.new + source[mutant.end :]
        if imported:
            put_in = exchange(path, changed, mutant)
            return self._verdict(tests, lambda chosen: self._run(chosen, put_in))

        def with_file(chosen: list[str]) -> Outcome:
            write_text(path, changed)
            try:
                return self._run(chosen, lambda: _import_with(path, changed), _IMPORTING)
            finally:
                write_text(path, source)  # what runs alone after it runs without the fault

        return self._verdict(tests, with_file)

    def _verdict(
        self, tests: list[str], with_fault: Callable[[list[str]], Outcome]
    ) -> tuple[str, str]:
        while tests:
            outcome = with_fault(tests)
            if outcome.state == "passed":
                return "survived", ""
            if outcome.state == "timeout":
                return "noticed", "past the limit of time"
            if outcome.test not in tests:  # nothing ran to its end, or could be imported
                sound = self._alone(tests[0])
                return ("noticed", outcome.test) if sound else ("not reached", "")
            # The first of them ran alone already.
            again = outcome.test == tests[0] or with_fault([outcome.test]).state != "passed"
            if again and self._alone(outcome.test):
                return "noticed", outcome.test
            tests = [test for test in tests if test != outcome.test]  # it fails by itself
        return "not reached", ""

    def _run(self, tests: list[str], put_in: Any, more: float = 0.0) -> Outcome:
        seconds = sum(self._tests[test]["seconds"] for test in tests)
        return run(self._folder, tests, 60 + 4 * seconds + more, put_in)

    def _alone(self, test: str) -> bool:
        """Whether a test passes without a fault."""
        if test not in self._sound:
            self._sound[test] = (
                self._run([test], lambda: import_everything(self._folder)).state == "passed"
            )
        return self._sound[test]


def _distance(test: str, module: str) -> int:
    """How far a test's file is from a module: 0 of the module, 1 of its folder, 2 elsewhere."""
    file, own = Path(test.partition("::")[0]), Path(module)
    folders = [path.parent.parts[1:] for path in (file, own)]
    if folders[0][:1] != folders[1][:1]:
        return 2
    name = file.stem.removeprefix("test_")
    return 0 if own.stem.startswith(name) or name.startswith(own.stem) else 1


def exchangeable(folder: Path, mutant: Mutant) -> bool:
    """Whether a mutant of the tree that is imported is one function's other code."""
    path = folder / mutant.module
    source = path.read_text()
    changed = source[: mutant.start] + mutant.new + source[mutant.end :]
    return exchange(path, changed, mutant) is not None


def exchange(path: Path, changed: str, mutant: Mutant) -> Any:
    """What gives the functions around a mutant the code of a changed source; None: it cannot."""
    function = surroundings(path.read_text(), mutant).function
    if function is None:
        return None
    codes = [code for code in _codes(compile(changed, str(path), "exec")) if _key(code) == function]
    live = [one for one in _functions().get(str(path), ()) if _key(one.__code__) == function]
    if len(codes) != 1 or not live or codes[0].co_freevars != live[0].__code__.co_freevars:
        return None

    def put_in() -> None:
        for one in live:
            one.__code__ = codes[0]

    return put_in


@functools.cache
def _functions() -> dict[str, list[types.FunctionType]]:
    """All functions that there are, by file; found once, when everything is imported."""
    found: dict[str, list[types.FunctionType]] = {}
    for one in gc.get_objects():
        if type(one) is types.FunctionType:
            found.setdefault(one.__code__.co_filename, []).append(one)
    return found


def _key(code: types.CodeType) -> tuple[str, int]:
    return code.co_name, code.co_firstlineno


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _import_with(path: Path, changed: str) -> None:
    """Import the tree with a file of it changed; one that cannot be imported fails every test."""
    assert path.read_text() == changed
    import_everything(Path.cwd())
