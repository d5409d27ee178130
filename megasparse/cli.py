"""What commands share: errors as one line with an exit code, sizes in bytes, Markdown tables."""

from __future__ import annotations

import argparse
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

from megasparse import log
from megasparse.errors import MegasparseError, StorageError, one_line
from megasparse.extras import MissingExtraError

EXIT_INTERRUPTED = 130
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def guarded(name: str, work: Callable[[], int | None], rank: int | None = None) -> int:
    """Run a command's work; its exit code: the work's own, 0 if it returns None, or an error's.

    A `MegasparseError`, or a file that the system refuses, is one line on stderr. Other exceptions
    are bugs and keep their traceback. SIGTERM ends the command through its clean-up.

    Args:
        name: of the command, as the line shows it.
        rank: of a command that a launcher starts: the error is a line of this rank's log, and
            SIGTERM ends the process at once, as a rank in a collective could not clean up.
    """
    log.setup(rank or 0)
    try:
        with exit_on_sigterm() if rank is None else nullcontext():
            return work() or 0
    except (MegasparseError, MissingExtraError) as error:
        kind, code, message = type(error).__name__, error.exit_code, one_line(error)
    except OSError as error:
        kind, code, message = StorageError.__name__, StorageError.exit_code, one_line(error)
    except KeyboardInterrupt:
        kind, code, message = "KeyboardInterrupt", EXIT_INTERRUPTED, "interrupted"
    if rank is None:
        sys.stderr.write(f"{name}: error: {message}\n")
    else:
        log.logger.error("%s: %s", kind, message)
    return code


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Let SIGTERM end the process through its clean-up, with the usual exit code 143."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def byte_count(text: str) -> int:
    """`5GB`, `500MB`, `1GiB` or a number of bytes, as the type of a flag.

    Raises:
        argparse.ArgumentTypeError: it is no size above 0.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?B?)", text.strip().upper())
    if match is None or match[2] not in _UNITS or not (size := float(match[1]) * _UNITS[match[2]]):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a size such as 5GB")
    return int(size)


def markdown_table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], text_columns: int = 1
) -> list[str]:
    """The lines of a Markdown table.

    Args:
        rows: cells, as many as columns; shown by `str`.
        text_columns: that many columns at the left hold text; numbers of the others stand right.

    Raises:
        ValueError: a row has another length.
    """
    lines = ["---"] * text_columns + ["---:"] * (len(columns) - text_columns)
    table = [f"| {' | '.join(columns)} |", f"|{'|'.join(lines)}|"]
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"a row of {len(row)} cells in a table of {len(columns)} columns")
        table.append(f"| {' | '.join(map(str, row))} |")
    return table
