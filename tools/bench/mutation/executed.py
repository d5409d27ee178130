"""Which tests execute which lines: a mutant is judged by the tests that reach it, and by no others.

Ranks and commands that tests fork are followed too; a process writes each line when it first
executes it, so that one that is killed has told what it did.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import mmap
import os
import sys
import threading
from pathlib import Path
from typing import Any

from tools.bench.mutation.forks import run
from tools.bench.mutation.places import AREAS

_MONITORING: Any = getattr(sys, "monitoring", None)  # from Python 3.12 on
_LONGEST_NAME = 4000
_FIXTURE = "fixture "  # before its name, in place of a test's


class Tracer:
    """Writes `test, module, line` for every line of the areas when a test first executes it."""

    def __init__(self, folder: Path, log: Path) -> None:
        self._folder = str(folder) + os.sep
        self._areas = tuple(os.path.join(str(folder), "megasparse", a) + os.sep for a in AREAS)
        self._descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._test = mmap.mmap(-1, _LONGEST_NAME + 4)  # forks see it
        self._seen: set[tuple[str, int]] = set()
        self._last = b""

    def start(self) -> None:
        """Follow this process, its threads and its forks."""
        if _MONITORING is None:
            threading.settrace(self._called)
            sys.settrace(self._called)
            return
        monitoring, events = _MONITORING, _MONITORING.events
        monitoring.use_tool_id(monitoring.COVERAGE_ID, "mutants")
        for event, callback in ((events.PY_START, self._began), (events.LINE, self._reached)):
            monitoring.register_callback(monitoring.COVERAGE_ID, event, callback)
        monitoring.set_events(monitoring.COVERAGE_ID, events.PY_START)

    def stop(self) -> None:
        """Follow new threads no longer; who started it gives this thread its own tracer back."""
        if _MONITORING is not None:
            _MONITORING.set_events(_MONITORING.COVERAGE_ID, 0)
            _MONITORING.free_tool_id(_MONITORING.COVERAGE_ID)
        else:
            threading.settrace(None)  # type: ignore[arg-type]
        os.close(self._descriptor)

    def name(self, test: str) -> None:
        """What is executed from now on belongs to `test`."""
        text = test.encode()[:_LONGEST_NAME]
        self._test.seek(0)
        self._test.write(len(text).to_bytes(4, "little") + text)

    def _began(self, code: Any, offset: int) -> Any:
        monitoring = _MONITORING
        if not code.co_filename.startswith(self._areas):
            return monitoring.DISABLE
        monitoring.set_local_events(monitoring.COVERAGE_ID, code, monitoring.events.LINE)
        if self._is_another_test():
            monitoring.restart_events()
        return None

    def _reached(self, code: Any, line: int) -> Any:
        self._note(code.co_filename, line)
        return _MONITORING.DISABLE

    def _called(self, frame: Any, event: str, argument: object) -> Any:
        return self._line if frame.f_code.co_filename.startswith(self._areas) else None

    def _line(self, frame: Any, event: str, argument: object) -> Any:
        self._note(frame.f_code.co_filename, frame.f_lineno)
        return self._line

    def _is_another_test(self) -> bool:
        length = int.from_bytes(self._test[:4], "little")
        test = self._test[4 : 4 + length]
        if test == self._last:
            return False
        self._last, self._seen = test, set()
        return True

    def _note(self, file: str, line: int) -> None:
        self._is_another_test()
        if (file, line) not in self._seen:
            self._seen.add((file, line))
            row = [self._last.decode(), file.removeprefix(self._folder), line]
            os.write(self._descriptor, json.dumps(row).encode() + b"\n")


class _Watch:
    """Names tests for the tracer; writes how long each took, and whether it passed.

    What a fixture of a wider scope executes belongs to all tests that use it, not to the first.
    """

    def __init__(self, tracer: Tracer, log: Path) -> None:
        self._tracer, self._log, self._took, self._test = tracer, log, 0.0, ""

    def pytest_collection_finish(self, session) -> None:
        """Which fixtures each test uses."""
        for item in session.items:
            self._write("fixtures", item.nodeid, item.fixturenames)

    def pytest_runtest_logstart(self, nodeid: str, location: object) -> None:
        """A test begins."""
        self._test = nodeid
        self._tracer.name(nodeid)
        self._took = 0.0

    def pytest_runtest_logreport(self, report) -> None:
        """A part of a test ends."""
        self._took += report.duration
        if report.when == "teardown" or not report.passed:
            self._write("ended", report.nodeid, [self._took, report.outcome])

    def fixture_begins(self, name: str) -> None:
        """What is executed from now on belongs to a fixture."""
        self._tracer.name(_FIXTURE + name)

    def fixture_ends(self) -> None:
        """It belongs to the test again."""
        self._tracer.name(self._test)

    def _write(self, *row: Any) -> None:
        with self._log.open("a") as file:
            file.write(json.dumps(row) + "\n")


def _watch(tracer: Tracer, log: Path) -> _Watch:
    """The plugin; pytest is imported in the fork alone."""
    pytest = importlib.import_module("pytest")
    one = _Watch(tracer, log)

    def around(fixturedef, request):
        if fixturedef.scope == "function":
            return (yield)
        one.fixture_begins(fixturedef.argname)
        try:
            return (yield)
        finally:
            one.fixture_ends()

    one.pytest_fixture_setup = pytest.hookimpl(wrapper=True)(around)  # type: ignore[attr-defined]
    return one


def follow(folder: Path, file: str, limit: float) -> dict[str, dict[str, Any]]:
    """Run one file of tests, and say of each that passed its seconds and its lines.

    Returns:
        id of a test -> {"seconds": float, "lines": {module: sorted lines}}.
    """
    lines, ends = (folder / f".{name}-{os.getpid()}" for name in ("lines", "ends"))
    for path in (lines, ends):
        path.unlink(missing_ok=True)
    tracer: list[Tracer] = []

    def prepare() -> None:
        tracer.append(Tracer(folder, lines))
        tracer[0].start()

    run(folder, [file], limit, prepare, lambda: [_watch(tracer[0], ends)], ("--maxfail=1000",))
    outcomes: dict[str, tuple[float, str]] = {}
    fixtures: dict[str, list[str]] = {}
    for line in ends.read_text().splitlines() if ends.exists() else []:
        kind, test, what = json.loads(line)
        if kind == "fixtures":
            fixtures[test] = [_FIXTURE + name for name in what]
        elif outcomes.get(test, (0.0, "passed"))[1] == "passed":
            outcomes[test] = tuple(what)
    executed: dict[str, dict[str, set[int]]] = {}
    for row in lines.read_bytes().splitlines() if lines.exists() else []:
        try:
            owner, module, number = json.loads(row)
        except ValueError:  # two processes wrote at once
            continue
        executed.setdefault(owner, {}).setdefault(module, set()).add(number)
    found = {}
    for test, (took, outcome) in outcomes.items():
        if outcome == "passed":
            parts = [executed.get(owner, {}) for owner in (test, *fixtures.get(test, ()))]
            modules = sorted({module for part in parts for module in part})
            merged = {m: sorted(set().union(*(p.get(m, ()) for p in parts))) for m in modules}
            found[test] = {"seconds": took, "lines": merged}
    return found


def load_map(path: Path) -> dict[str, Any]:
    """What is known: `{"files": {file of tests: digest}, "tests": what follow returns}`."""
    return json.loads(path.read_text()) if path.exists() else {"files": {}, "tests": {}}


def unfollowed(known: dict[str, Any], folder: Path, files: list[str]) -> list[str]:
    """The files of tests that are new or changed."""
    return [file for file in files if known["files"].get(file) != _digest(folder / file)]


def replace(known: dict[str, Any], folder: Path, file: str, tests: dict[str, Any]) -> None:
    """What is known of a file's tests from now on."""
    for test in [test for test in known["tests"] if test.startswith(f"{file}::")]:
        del known["tests"][test]
    known["tests"].update(tests)
    known["files"][file] = _digest(folder / file)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
