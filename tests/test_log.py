"""The log: whose lines are shown, and how they look on a terminal of 80 columns."""

from __future__ import annotations

import io
import os
import pty
import sys

import pytest

from megasparse import log
from megasparse.progress import progress


@pytest.fixture
def restored():
    before = (log.logger.handlers[:], log.logger.level, log.logger.propagate)
    yield
    log.logger.handlers[:], log.logger.propagate = before[0], before[2]
    log.logger.setLevel(before[1])


def _written(monkeypatch, rank, level, columns=None):
    """What a rank writes, to a file or to a terminal that is `columns` wide."""
    ours, theirs = pty.openpty() if columns else os.pipe()
    monkeypatch.setenv("COLUMNS", str(columns or 0))
    with os.fdopen(theirs, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        log.setup(rank, level)
        log.logger.debug("detail")
        log.logger.info("accepted %s", " ".join(["--some-flag"] * 20))
        log.logger.info("short")
        log.warn_once("a warning at %s", f"{rank}{level}{columns}")
        log.logger.error("wrong")
        stream.flush()
        text = os.read(ours, 1 << 16).decode()
    os.close(ours)
    return text.replace("\r\n", "\n").splitlines()


def test_levels_are_of_the_first_rank(monkeypatch, restored):
    for level, number in (("debug", 5), ("info", 4), ("warning", 2), ("error", 1)):
        assert len(_written(monkeypatch, 0, level)) == number
    for level, number in (("debug", 1), ("info", 1), ("error", 1)):
        assert len(_written(monkeypatch, 1, level)) == number


def test_a_terminals_lines_break_between_words(monkeypatch, restored):
    whole = _written(monkeypatch, 0, "info")
    assert max(map(len, whole)) > 200  # a file's lines stay whole
    lines = _written(monkeypatch, 0, "info", 80)
    assert max(map(len, lines)) <= 80 and len(lines) > len(whole)
    assert " ".join(" ".join(lines).split()).count("--some-flag") == 20


def test_a_command_stays_whole(monkeypatch, restored):
    command = log.COMMAND + "python tool.py " + "--flag value " * 10
    monkeypatch.setenv("COLUMNS", "80")
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        log.setup(0)
        log.logger.info("%s", "\n".join(["", "Next:", command]))
        stream.flush()
        assert command in os.read(ours, 1 << 16).decode()
    os.close(ours)


def test_a_line_goes_above_the_bar_of_a_terminal(monkeypatch, restored):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    log.setup(0)
    with progress(desc="work", total=4) as bar:
        bar.update(2)
        log.logger.info("a line")
    with progress(desc="more", total=4, stream=io.StringIO()):  # of a log file
        log.logger.info("another")
    lines = screen.getvalue().split("\n")
    above = next(number for number, line in enumerate(lines) if line.endswith("a line"))
    *_, cleared, line = lines[above].split("\r")
    assert not cleared.strip() and line[2] == ":"  # the line begins where the bar was
    assert "work:  50%" in lines[above + 1]  # which is drawn again below
    assert lines[-2].endswith("another") and "\r" not in lines[-2]
