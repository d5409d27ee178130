"""Small faults put into the code one at a time, and whether the tests notice.

A mutant is one change of one expression: a comparison, an operator, a constant, a condition, a
call that is left out. A sample is drawn with a seed. First every test is followed once, to know
which lines it executes (`--map`, kept for later calls). Then each mutant is judged in a fork of a
process that has imported everything: its function's code is exchanged, and the tests that execute
its line run, the quickest first, until one fails. A test that fails is run alone with the fault and
without it before it counts. Mutants that run at import are judged in a process that imports anew.

    python -m tools.bench.mutants --count 100 --map map.json --output mutants.json

What no test notices is listed; a person says which of them change no behaviour.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib
import json
import os
import random
import shutil
import sys
import tempfile
import types
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megasparse.atomic_files import write_text
from tools.bench.mutation.executed import make_map
from tools.bench.mutation.forks import Outcome, import_everything, run
from tools.bench.mutation.places import ROOT, Mutant, mutants, surroundings

COPIED = ("megasparse", "tests", "tools", "launch", "configs", "docs")
# Folders of tests that execute the areas; others test kernels, data, flags, and real launchers.
JUDGES = (
    "sparsity", "optim", "megatron", "checkpoint", "convert", "compress", "estimate", "preflight",
    "tools", "distillation", "train", "parallel/test_consistency.py", "parallel/test_details.py",
)  # fmt: skip
# Real experiments: long, and they run what tests of training run.
NO_JUDGES = ("tools/bench", "tools/experiments", "tools/results", "tools/test_search_decay.py")


def test_files() -> list[str]:
    """The files that may notice, those of the areas themselves first."""
    tests = ROOT / "tests"
    found: list[Path] = []
    for name in JUDGES:
        one = tests / name
        found += sorted(one.rglob("test_*.py")) if one.is_dir() else [one]
    others = tuple(str(tests / name) for name in NO_JUDGES)
    return [str(path.relative_to(ROOT)) for path in found if not str(path).startswith(others)]


class Judge:
    """Judges mutants of a copy of the tree.

    Args:
        folder: the copy.
        tests: what `executed.make_map` found.
        budget: seconds of tests for one mutant, by what they took when they were followed.
    """

    def __init__(self, folder: Path, tests: dict[str, dict[str, Any]], budget: float) -> None:
        self._folder, self._tests, self._budget = folder, tests, budget
        self._sound: dict[str, bool] = {}

    def reached_by(self, mutant: Mutant) -> list[str]:
        """Tests that execute a mutant's statement, the quickest first, within the budget.

        What runs at import is judged by the tests that execute anything of its module.
        """
        around = surroundings((ROOT / mutant.module).read_text(), mutant)
        found = []
        for test, one in self._tests.items():
            lines = one["lines"].get(mutant.module, ())
            if lines and (around.function is None or any(n in around.lines for n in lines)):
                found.append(test)
        found.sort(key=lambda test: self._tests[test]["seconds"])
        total, chosen = 0.0, list[str]()
        for test in found:
            total += self._tests[test]["seconds"] + 0.02
            if not chosen or total <= self._budget:
                chosen.append(test)
        return chosen

    def judge(self, mutant: Mutant, imported: bool) -> tuple[str, str] | None:
        """What becomes of a mutant, and the test that noticed it.

        Args:
            imported: the project is imported, so that a function's code is exchanged; else a file.

        Returns:
            ("noticed" | "survived" | "not reached", test); None where only a file can be changed.
        """
        tests = self.reached_by(mutant)
        if not tests:
            return "not reached", ""
        path = self._folder / mutant.module
        source = path.read_text()
        changed = source[: mutant.start] + mutant.new + source[mutant.end :]
        if imported:
            exchange = _exchange(path, changed, surroundings(source, mutant).function)
            if exchange is None:
                return None
            return self._verdict(tests, exchange)
        write_text(path, changed)
        try:
            return self._verdict(tests, lambda: _import_with(path, changed))
        finally:
            write_text(path, source)

    def _verdict(self, tests: list[str], put_in: Any) -> tuple[str, str]:
        while tests:
            outcome = self._run(tests, put_in)
            if outcome.state == "passed":
                return "survived", ""
            if outcome.state == "timeout" or outcome.test not in tests:
                return "noticed", outcome.test or "past the limit of time"
            # The first of them ran alone already.
            again = outcome.test == tests[0] or self._run([outcome.test], put_in).state != "passed"
            if again and self._alone(outcome.test):
                return "noticed", outcome.test
            tests = [test for test in tests if test != outcome.test]  # it fails by itself
        return "not reached", ""

    def _run(self, tests: list[str], put_in: Any) -> Outcome:
        seconds = sum(self._tests[test]["seconds"] for test in tests)
        return run(self._folder, tests, 60 + 4 * seconds, put_in)

    def _alone(self, test: str) -> bool:
        """Whether a test passes without a fault."""
        if test not in self._sound:
            self._sound[test] = (
                self._run([test], lambda: import_everything(self._folder)).state == "passed"
            )
        return self._sound[test]


def _exchange(path: Path, changed: str, function: tuple[str, int] | None) -> Any:
    """What gives the functions of a name the code of a changed source; None where it cannot."""
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


def _judge_all(judge: Judge, rows: list[dict[str, Any]], output: Path, imported: bool) -> None:
    for row in rows:
        mutant = Mutant(**{name: row[name] for name in Mutant.__dataclass_fields__})
        if "verdict" in row:
            continue
        verdict = judge.judge(mutant, imported)
        if verdict is None:
            continue
        row["verdict"], row["test"] = verdict
        write_text(output, json.dumps(rows, indent=1))
        place = f"{mutant.module}:{mutant.line}"
        print(f"{verdict[0]:11} {place} {mutant.old!r} -> {mutant.new!r} {verdict[1]}", flush=True)


def _in_a_fork(work: Any) -> None:
    """Do something that imports the project, so that this process goes on without it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            sys.stdout.flush()
            os._exit(code)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        raise SystemExit("a part of the work failed; see above")


def draw(count: int, seed: int, chosen: str = "") -> list[dict[str, Any]]:
    """A sample of mutants, as rows without a verdict."""
    everything = [one for one in mutants() if one.module.startswith(f"megasparse/{chosen}")]
    sample = random.Random(seed).sample(everything, min(count, len(everything)))
    print(f"{len(sample)} of {len(everything)} mutants", flush=True)
    return [asdict(one) for one in sample]


def main(argv: list[str] | None = None) -> int:
    """Draw, judge and write; 0 whatever was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=100, help="mutants to draw")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--area", default="", help="draw from megasparse/AREA alone")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of tests for a mutant")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds to follow one file")
    parser.add_argument("--map", type=Path, help="what tests execute; made where it is missing")
    parser.add_argument("--output", type=Path, required=True, help="JSON, written as it goes")
    args = parser.parse_args(argv)
    output = args.output.resolve()
    map_path = (args.map or args.output.with_suffix(".map.json")).resolve()
    if output.exists():
        rows = json.loads(output.read_text())
    else:
        rows = draw(args.count, args.seed, args.area)
    os.environ |= {"TRITON_INTERPRET": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    with tempfile.TemporaryDirectory(prefix="mutants-") as name:
        folder = Path(name)
        for part in COPIED:
            shutil.copytree(ROOT / part, folder / part)
        for file in filter(Path.is_file, ROOT.iterdir()):
            shutil.copy(file, folder)
        _be_in(folder)

        def warm() -> None:
            import_everything(folder)
            _functions()
            gc.freeze()  # forks would copy what their collector looks at
            tests = make_map(folder, test_files(), args.limit, map_path)["tests"]
            _judge_all(Judge(folder, tests, args.budget), rows, output, imported=True)

        _in_a_fork(warm)
        rows = json.loads(output.read_text()) if output.exists() else rows
        tests = json.loads(map_path.read_text())["tests"]
        sys.dont_write_bytecode = True  # of a file that is changed and back within a second
        _judge_all(Judge(folder, tests, args.budget), rows, output, imported=False)
    counts = {v: sum(row["verdict"] == v for row in rows) for v in ("noticed", "survived")}
    print(f"noticed: {counts['noticed']} of {sum(counts.values())} that tests reach")
    print(f"reached by no test on this machine: {len(rows) - sum(counts.values())}")
    return 0


def _be_in(folder: Path) -> None:
    """Import from a copy of the tree from now on; what is imported of the project is forgotten."""
    os.chdir(folder)
    os.environ["PYTHONPATH"] = str(folder)
    sys.path[:] = [str(folder), *(p for p in sys.path if Path(p or ".").resolve() != ROOT)]
    for name in [name for name in sys.modules if name.split(".")[0] in ("megasparse", "tests")]:
        del sys.modules[name]
    for name in ("torch", "numpy", "pytest", "transformers"):
        importlib.import_module(name)


if __name__ == "__main__":
    sys.exit(main())
