"""The texts of a record: of a JSON object in one line of UTF-8, or of a row of Parquet."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megasparse.data.inputs import Payload, find_inputs, read_records
from megasparse.errors import DataError


def texts_of(payload: Payload, keys: Sequence[str], where: str) -> list[str]:
    """The strings under `keys` of one record.

    Args:
        payload: of `inputs.read_records`.
        keys: names that the record must have.
        where: "file:line", for the errors.

    Raises:
        DataError: no UTF-8, no JSON, no object, a key is missing or is no string, or the string
            has half of a surrogate pair (which UTF-8 cannot hold).
    """
    if isinstance(payload, DataError):
        raise payload
    if isinstance(payload, tuple):
        return [_text(value, key, where) for key, value in zip(keys, payload, strict=True)]
    return parse_line(payload, keys, where)


def parse_line(line: bytes, keys: Sequence[str], where: str) -> list[str]:
    """The strings under `keys` of one JSON object; raises as `texts_of`."""
    record = record_of(line, where)
    return [_text_under(record, key, where) for key in keys]


def record_of(line: bytes, where: str) -> dict[str, Any]:
    """One JSON object; raises as `texts_of`."""
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
    return record


def _text_under(record: dict, key: str, where: str) -> str:
    if key not in record:
        found = ", ".join(repr(name)[:40] for name in list(record)[:8]) or "none"
        raise DataError(f"{where}: key {key!r} is missing, found {found}")
    return _text(record[key], key, where)


def _text(text: Any, key: str, where: str) -> str:
    if not isinstance(text, str):
        kind = "null" if text is None else type(text).__name__
        raise DataError(f"{where}: key {key!r}: found {kind}, expected a string")
    check_text(text, f"{where}: key {key!r}")
    return text


def check_text(text: str, where: str) -> None:
    """Refuse half of a surrogate pair.

    Raises:
        DataError: UTF-8 cannot hold the text.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: found half of a surrogate pair at character {error.start + 1}, expected "
            "text that UTF-8 can hold"
        ) from None


def read_texts(path: Path, key: str = "text") -> Iterator[str]:
    """The texts under `key` of an input, in order; raises as the functions above do."""
    for source in find_inputs([path]):
        for number, payload in read_records(source, [key]):
            yield texts_of(payload, [key], f"{source.path}:{number}")[0]
