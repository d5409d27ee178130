"""Which tests execute which lines: a mutant is judged by the tests that reach it, and by no others.

Ranks and commands that tests fork are followed too; a process writes each line when it first
executes it, so that one that is killed has told what it did.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import sys
import threading
from pathlib import Path
from typing import Any

from megasparse.atomic_files import write_text
from tools.bench.mutation.forks import run
from tools.bench.mutation.places import AREAS

_LONGEST_NAME = 4000


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
        threading.settrace(self._called)
        sys.settrace(self._called)

    def stop(self) -> None:
        """Follow new threads no longer; who started it gives this thread its own tracer back."""
        threading.settrace(None)  # type: ignore[arg-type]
        os.close(self._descriptor)

    def name(self, test: str) -> None:
        """What is executed from now on belongs to `test`."""
        text = test.encode()[:_LONGEST_NAME]
        self._test.seek(0)
        self._test.write(len(text).to_bytes(4, "little") + text)

    def _called(self, frame: Any, event: str, argument: object) -> Any:
        return self._line if frame.f_code.co_filename.startswith(self._areas) else None

    def _line(self, frame: Any, event: str, argument: object) -> Any:
        length = int.from_bytes(self._test[:4], "little")
        test = self._test[4 : 4 + length]
        if test != self._last:
            self._last, self._seen = test, set()
        place = (frame.f_code.co_filename, frame.f_lineno)
        if place not in self._seen:
            self._seen.add(place)
            row = [test.decode(), place[0].removeprefix(self._folder), place[1]]
            os.write(self._descriptor, json.dumps(row).encode() + b"\n")
        return self._line


class _Watch:
    """Names tests for the tracer; writes how long each took, and whether it passed."""

    def __init__(self, tracer: Tracer, log: Path) -> None:
        self._tracer, self._log, self._took = tracer, log, 0.0

    def pytest_runtest_logstart(self, nodeid: str, location: object) -> None:
        """A test begins."""
        self._tracer.name(nodeid)
        self._took = 0.0

    def pytest_runtest_logreport(self, report) -> None:
        """A part of a test ends."""
        self._took += report.duration
        if report.when == "teardown" or not report.passed:
            row = [report.nodeid, self._took, report.outcome]
            with self._log.open("a") as file:
                file.write(json.dumps(row) + "\n")


def follow(folder: Path, file: str, limit: float) -> dict[str, dict[str, Any]]:
    """Run one file of tests, and say of each that passed its seconds and its lines.

    Returns:
        id of a test -> {"seconds": float, "lines": {module: sorted lines}}.
    """
    lines, ends = folder / ".lines", folder / ".ends"
    for path in (lines, ends):
        path.unlink(missing_ok=True)
    tracer: list[Tracer] = []

    def prepare() -> None:
        tracer.append(Tracer(folder, lines))
        tracer[0].start()

    run(folder, [file], limit, prepare, lambda: [_Watch(tracer[0], ends)], ("--maxfail=1000",))
    outcomes: dict[str, tuple[float, str]] = {}
    for line in ends.read_text().splitlines() if ends.exists() else []:
        test, took, outcome = json.loads(line)
        if outcomes.get(test, (0.0, "passed"))[1] == "passed":
            outcomes[test] = (took, outcome)
    found: dict[str, dict[str, set[int]]] = {test: {} for test in outcomes}
    for row in lines.read_bytes().splitlines() if lines.exists() else []:
        try:
            test, module, number = json.loads(row)
        except ValueError:  # two processes wrote at once
            continue
        if test in found:
            found[test].setdefault(module, set()).add(number)
    return {
        test: {
            "seconds": took,
            "lines": {module: sorted(numbers) for module, numbers in found[test].items()},
        }
        for test, (took, outcome) in outcomes.items()
        if outcome == "passed"
    }


def make_map(folder: Path, files: list[str], limit: float, output: Path) -> dict[str, Any]:
    """Follow all files that are new or changed; the map is written after each."""
    known = json.loads(output.read_text()) if output.exists() else {"files": {}, "tests": {}}
    for file in files:
        digest = hashlib.sha256((folder / file).read_bytes()).hexdigest()
        if known["files"].get(file) != digest:
            tests = follow(folder, file, limit)
            for test in [test for test in known["tests"] if test.startswith(f"{file}::")]:
                del known["tests"][test]
            known["tests"].update(tests)
            known["files"][file] = digest
            write_text(output, json.dumps(known))
            took = sum(one["seconds"] for one in tests.values())
            print(f"{file}: {len(tests)} tests, {took:.1f} s", flush=True)
    return known
