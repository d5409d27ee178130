"""pytest in a fork of a process that has imported everything, with ranks that are forks too.

A test takes milliseconds where imports take seconds. The ranks that tests start come from a server
that is forked before the first test, so that nothing of a test is in them.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.util
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megasparse.atomic_files import write_text

# What the suite's own server of ranks imports first (tests/forkserver.py), and one more.
IMPORTED = ("tests.cpu_only", "pytest", "megasparse.train.main", "tests.dist", "tests.forked")
OPTIONS = ["-q", "-p", "no:cacheprovider", "-o", "addopts="]


@dataclass(frozen=True)
class Outcome:
    """How tests ended.

    Attributes:
        state: "passed", "failed", or "timeout".
        test: the first that failed, if one did.
    """

    state: str
    test: str = ""


class _Order:
    """Tests in the order in which they are given, and the name of the first that fails."""

    def __init__(self, tests: list[str], report: Path) -> None:
        self._place = {test: number for number, test in enumerate(tests)}
        self._report = report

    def pytest_collection_finish(self, session) -> None:
        """After the suite's own order."""
        session.items.sort(key=lambda item: self._place.get(item.nodeid, len(self._place)))

    def pytest_runtest_logreport(self, report) -> None:
        """The first failure."""
        if report.failed and not self._report.exists():
            write_text(self._report, json.dumps(report.nodeid))


def import_everything(folder: Path) -> None:
    """Import what tests need, from `folder`."""
    for name in IMPORTED:
        importlib.import_module(name)
    for path in sorted((folder / "megasparse").rglob("*.py")):
        name = ".".join(path.relative_to(folder).with_suffix("").parts)
        if "triton" not in name and "__main__" not in name:
            importlib.import_module(name.removesuffix(".__init__"))


def run(
    folder: Path,
    tests: list[str],
    limit: float,
    prepare: Callable[[], object] = lambda: None,
    plugins: Callable[[], list[object]] = list,
    options: tuple[str, ...] = ("-x",),
) -> Outcome:
    """Run tests of the tree in `folder` in a fork.

    Args:
        tests: ids of tests, or files, in this order.
        limit: seconds.
        prepare: called in the fork before anything else.
        plugins: makes pytest plugins, in the fork.
        options: more of pytest's.
    """
    report = folder / f".first-failure-{os.getpid()}"
    report.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        os.setsid()
        silence = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(silence, stream)
        code = 99
        try:
            prepare()
            _fork_ranks()
            pytest = importlib.import_module("pytest")
            more = [_Order(tests, report), *plugins()]
            place = f"--basetemp={folder}/.tests-{os.getppid()}"  # each worker has its own
            code = int(pytest.main([*OPTIONS, place, *options, *tests], plugins=more))
        finally:
            os._exit(code)
    ended = _end(child, limit)
    if ended is None:
        return Outcome("timeout")
    failed = report.exists() and json.loads(report.read_text())
    report.unlink(missing_ok=True)
    return Outcome("passed") if ended == 0 else Outcome("failed", failed or f"exit code {ended}")


def _end(child: int, limit: float) -> int | None:
    """The exit code; None past the limit. Nothing of the fork's session goes on."""
    end = time.monotonic() + limit
    status: int | None = None
    while status is None and time.monotonic() < end:
        done, code = os.waitpid(child, os.WNOHANG)
        status = code if done else None
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    if status is None:
        os.waitpid(child, 0)
        return None
    return os.waitstatus_to_exitcode(status)


def _fork_ranks() -> None:
    """The server that ranks are forked from becomes a fork itself; it would import all again."""
    importlib.import_module("tests.forkserver")
    server: Any = multiprocessing.forkserver
    start = multiprocessing.util.spawnv_passfds

    def fork(path, arguments, descriptors):
        if "forkserver" not in str(arguments[-1]):
            return start(path, arguments, descriptors)
        child = os.fork()
        if child == 0:
            try:
                server._forkserver._lock = threading.Lock()  # the caller holds the old one
                server.main(*descriptors, None)
            finally:
                os._exit(0)
        return child

    multiprocessing.util.spawnv_passfds = fork  # type: ignore[assignment]
    server.ensure_running()
