"""What commands share: one line for an error, clean ends, sizes, tables."""

from __future__ import annotations

import argparse
import os
import signal

import pytest

from megasparse.cli import byte_count, guarded, markdown_table
from megasparse.errors import DataError


def _raise(error: BaseException):
    raise error


def test_the_exit_code_is_the_works_own():
    before = signal.getsignal(signal.SIGTERM)
    assert guarded("x.py", lambda: None) == 0
    assert guarded("x.py", lambda: 3) == 3
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (DataError("a.bin:\n no such file"), 65, "x.py: error: a.bin: no such file\n"),
        (OSError(28, "No space left", "a.bin"), 74, "x.py: error: a.bin: No space left\n"),
        (KeyboardInterrupt(), 130, "x.py: error: interrupted\n"),
    ],
)
def test_an_error_is_one_line(capsys, error, code, line):
    assert guarded("x.py", lambda: _raise(error)) == code
    assert capsys.readouterr().err == line


def test_a_ranks_error_is_a_line_of_its_log(capsys):
    assert guarded("x.py", lambda: _raise(DataError("no such file")), rank=3) == 65
    line = capsys.readouterr().err
    assert line.startswith("[rank 3] error: ") and line.endswith("DataError: no such file\n")


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        guarded("x.py", lambda: 1 // 0)


def test_sigterm_ends_through_the_clean_up():
    cleaned = []

    def work() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            cleaned.append(True)

    with pytest.raises(SystemExit) as caught:
        guarded("x.py", work)
    assert caught.value.code == 143 and cleaned


def test_byte_counts():
    assert byte_count("5GB") == 5 * 10**9 and byte_count("1.5 KiB") == 1536
    assert byte_count("7") == 7
    for text in ("", "GB", "0", "5 parsecs", "5TB"):
        with pytest.raises(argparse.ArgumentTypeError):
            byte_count(text)


def test_markdown_tables():
    assert markdown_table(["a", "b", "c"], [["x", "y", 1.5]], text_columns=2) == [
        "| a | b | c |",
        "|---|---|---:|",
        "| x | y | 1.5 |",
    ]
    with pytest.raises(ValueError, match="1 cells in a table of 2"):
        markdown_table(["a", "b"], [["x"]])
