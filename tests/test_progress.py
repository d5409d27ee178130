"""Progress: quiet in a log for short work, whole lines for long work, a bar on a terminal."""

from __future__ import annotations

import errno
import io
import os
import pty
import signal
from collections.abc import Iterator

import pytest
from tqdm import tqdm

from megasparse import progress as module
from megasparse.progress import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _until_hung_up(reading: int) -> Iterator[bytes]:
    """What a terminal shows arrives in parts; after the last one Linux answers with EIO."""
    while True:
        try:
            part = os.read(reading, 4096)
        except OSError as error:
            assert error.errno == errno.EIO
            return
        yield part


def test_short_work_prints_nothing_in_a_log() -> None:
    stream = io.StringIO()
    assert list(progress(range(1000), desc="work", stream=stream)) == list(range(1000))
    with progress(desc="work", total=10, stream=stream) as bar:
        bar.update(10)
    assert stream.getvalue() == ""


def test_long_work_prints_lines_in_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOG_INTERVAL_SECONDS", 0.0)
    stream = io.StringIO()
    with progress(desc="work", total=4096, unit="B", stream=stream) as bar:
        for _ in range(4):
            bar.update(1024)
    lines = [line for line in stream.getvalue().splitlines() if line]
    assert len(lines) > 1 and all(line.startswith("work:") for line in lines)
    assert "\r" not in stream.getvalue() and "4.00k/4.00k" in lines[-1]


def test_terminal_gets_a_bar_and_disabled_nothing() -> None:
    stream = Terminal()
    list(progress(range(3), desc="work", stream=stream))
    assert "\r" in stream.getvalue() and "3/3" in stream.getvalue()
    silent = Terminal()
    list(progress(range(3), desc="work", stream=silent, enabled=False))
    assert silent.getvalue() == ""


def test_a_terminal_that_does_not_know_its_width_gets_a_bar() -> None:
    reading, terminal = pty.openpty()  # 0 columns until somebody sets them
    assert os.get_terminal_size(terminal).columns == 0
    with open(terminal, "w") as stream:
        list(progress(range(3), desc="work", stream=stream))
    shown = b"".join(_until_hung_up(reading)).decode()
    os.close(reading)
    assert "work: 100%" in shown and "3/3" in shown


def test_a_killed_fork_that_draws_does_not_stop_its_parent():
    """tqdm's own lock is a semaphore of all forks; here it belongs to a process."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with tqdm.get_lock():
            os.write(writing, b"x")
            signal.pause()
    os.read(reading, 1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert tqdm.get_lock().acquire(timeout=10)
    tqdm.get_lock().release()
    assert list(progress(range(3), desc="work", stream=io.StringIO())) == [0, 1, 2]
