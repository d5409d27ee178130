"""JSON lines: one object a line, UTF-8, LF or CRLF; each error names the file and the line."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from megasparse.data.file_errors import read_error
from megasparse.errors import DataError

MAX_LINE_BYTES = 1 << 30


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Number (from 1) and bytes of each line that is not blank, without its line end.

    A byte-order mark at the start of the file is dropped.

    Raises:
        DataError: the file cannot be read or holds nothing, or a line exceeds `MAX_LINE_BYTES`.
    """
    number = 0
    try:
        with open(path, "rb") as stream:
            while raw := stream.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(raw) > MAX_LINE_BYTES:
                    raise DataError(f"{path}:{number}: found a line above {MAX_LINE_BYTES} bytes")
                if number == 1:
                    raw = raw.removeprefix(codecs.BOM_UTF8)
                line = raw.strip(b"\r\n\t ")
                if line:
                    yield number, line
    except OSError as error:
        raise read_error(path, error) from error
    if number == 0:
        raise DataError(f"{path}: found an empty file, expected JSON lines")


def parse_line(line: bytes, keys: Sequence[str], where: str) -> list[str]:
    """The strings under `keys` of one JSON object.

    Args:
        line: the line's bytes.
        keys: names that the object must have.
        where: "file:line", for the errors.

    Raises:
        DataError: no UTF-8, no JSON, no object, a key is missing or is no string, or the string
            has half of a surrogate pair (which UTF-8 cannot hold).
    """
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: found byte 0x{line[error.start]:02x} at column {error.start + 1} "
            f"({error.reason}), expected UTF-8"
        ) from None
    except RecursionError:
        raise DataError(f"{where}: found JSON that is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: broken JSON at column {error.colno}: {error.msg}") from None
    except ValueError as error:  # such as an integer of more digits than Python converts
        raise DataError(f"{where}: broken JSON: {error}") from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: found a JSON {type(record).__name__}, expected an object")
    return [_text_under(record, key, where) for key in keys]


def _text_under(record: dict, key: str, where: str) -> str:
    if key not in record:
        found = ", ".join(repr(name)[:40] for name in list(record)[:8]) or "none"
        raise DataError(f"{where}: key {key!r} is missing, found {found}")
    text = record[key]
    if not isinstance(text, str):
        kind = "null" if text is None else type(text).__name__
        raise DataError(f"{where}: key {key!r}: found {kind}, expected a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: key {key!r}: found half of a surrogate pair at character "
            f"{error.start + 1}, expected text that UTF-8 can hold"
        ) from None
    return text


def read_texts(path: Path, key: str = "text") -> Iterator[str]:
    """The texts under `key` of a JSONL file, in order; raises as the functions above do."""
    for number, line in read_lines(path):
        yield parse_line(line, [key], f"{path}:{number}")[0]
