"""Text as it comes: JSON lines from files, gzip, zstd, pipes and folders, and Parquet.

What a file is, its first bytes say, not its name. Records come in order with their number from 1
(lines, or rows of Parquet), and whoever reads knows how many bytes of the input are behind them:
compressed ones, as progress needs them.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import importlib
import io
import os
import stat
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from megasparse.data.file_errors import read_error
from megasparse.errors import DataError

MAX_LINE_BYTES = 1 << 30
STDIN = Path("-")
# Of a folder, files with these endings are read.
SUFFIXES = (".jsonl", ".json", ".ndjson", ".parquet")
_COMPRESSED = (".gz", ".zst")
_GZIP, _ZSTD, _PARQUET = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1"
_CHUNK = 1 << 20

# A line's bytes, the values of a Parquet row, or why a line cannot be read.
Payload = bytes | tuple[Any, ...] | DataError


@dataclass
class Source:
    """One input and what was read of it.

    Attributes:
        path: of the file; `-` is standard input.
        size: bytes of the file; None of a pipe.
        kind: "jsonl", "gzip", "zstd" or "parquet", once it was opened.
        records: lines that are not blank, or rows.
        num_bytes: read so far, as they are in the input.
        sha256: of them, once all are read.
    """

    path: Path
    size: int | None
    kind: str = ""
    records: int = 0
    num_bytes: int = 0
    sha256: str = ""


def find_inputs(paths: Sequence[Path]) -> list[Source]:
    """The files to read, in order: folders are searched, and their files sorted by name.

    Nothing is opened: a pipe can be read once.

    Raises:
        DataError: a path is missing, may not be read, or is a device; a folder holds no input.
    """
    found = []
    for path in paths:
        located = path if path == STDIN else path.expanduser()
        if located != STDIN and located.is_dir():
            inside = sorted(file for file in located.rglob("*") if _belongs(file, located))
            if not inside:
                endings = ", ".join(SUFFIXES)
                raise DataError(
                    f"{path}: found no input in this folder, expected files that end with "
                    f"{endings} (or those with .gz or .zst)"
                )
            found += [_source(file) for file in inside]
        else:
            found.append(_source(located))
    return found


def read_records(source: Source, keys: Sequence[str]) -> Iterator[tuple[int, Payload]]:
    """Number and payload of each record; counts in `source` on the way.

    Args:
        keys: columns to read of Parquet.

    Raises:
        DataError: the input cannot be read, is damaged, or holds nothing.
    """
    try:
        with _open(source) as raw:
            counted = _Counted(raw, source)
            stream = io.BufferedReader(counted, _CHUNK)
            head = stream.peek(4)[:4]
            if head == _PARQUET:
                source.kind = "parquet"
                yield from _rows(source, keys)
                return
            yield from _lines(source, _decompressed(stream, head, source))
            source.sha256 = counted.digest.hexdigest()
    except OSError as error:
        raise read_error(source.path, error) from error


def _belongs(file: Path, folder: Path) -> bool:
    name = file.name
    for ending in _COMPRESSED:
        name = name.removesuffix(ending)
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return name.endswith(SUFFIXES) and not hidden and file.is_file()


def _source(path: Path) -> Source:
    try:
        status = os.fstat(sys.stdin.fileno()) if path == STDIN else os.stat(path)
    except OSError as error:
        raise read_error(path, error) from error
    if path != STDIN and not os.access(path, os.R_OK):
        raise DataError(f"{path}: cannot read: Permission denied")
    if stat.S_ISREG(status.st_mode):
        if status.st_size == 0:
            raise DataError(f"{path}: found an empty file, expected JSON lines")
        return Source(path, status.st_size)
    if stat.S_ISFIFO(status.st_mode) or stat.S_ISSOCK(status.st_mode) or path == STDIN:
        return Source(path, None)
    raise DataError(f"{path}: found a device, expected a file, a folder or a pipe")


def _open(source: Source) -> BinaryIO:
    if source.path == STDIN:
        return open(os.dup(sys.stdin.fileno()), "rb", buffering=0)
    return open(source.path, "rb", buffering=0)


class _Counted(io.RawIOBase):
    """Counts and hashes what is read."""

    def __init__(self, raw: BinaryIO, source: Source) -> None:
        self._raw, self._source, self.digest = raw, source, hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._raw.readinto(buffer) or 0  # type: ignore[attr-defined]
        self.digest.update(memoryview(buffer)[:count])
        self._source.num_bytes += count
        return count


class _Zstd(io.RawIOBase):
    """Frames of zstd one after the other; unlike the library's reader it notices a cut one."""

    def __init__(self, stream: io.BufferedReader, path: Path) -> None:
        self._stream, self._path = stream, path
        self._library = _library("zstandard", path, "zstd")
        self._decoder: Any = None
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            chunk = self._stream.read1(_CHUNK)
            if not chunk:
                if self._decoder is not None:
                    raise DataError(f"{self._path}: found zstd data that is cut off at the end")
                return 0
            self._ready = self._decode(chunk)
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _decode(self, chunk: bytes) -> bytes:
        parts = []
        while chunk:
            if self._decoder is None:
                # The largest window of `zstd --long=31`.
                context = self._library.ZstdDecompressor(max_window_size=1 << 31)
                self._decoder = context.decompressobj()
            try:
                parts.append(self._decoder.decompress(chunk))
            except self._library.ZstdError as error:
                raise DataError(f"{self._path}: found damaged zstd data ({error})") from None
            chunk = b""
            if self._decoder.eof:
                chunk, self._decoder = self._decoder.unused_data, None
        return b"".join(parts)


def _decompressed(stream: Any, head: bytes, source: Source) -> io.BufferedReader:
    if head[:2] == _GZIP:
        source.kind = "gzip"
        unzipped: Any = gzip.GzipFile(fileobj=stream)
        return io.BufferedReader(unzipped, _CHUNK)
    if head == _ZSTD:
        source.kind = "zstd"
        return io.BufferedReader(_Zstd(stream, source.path), _CHUNK)
    source.kind = "jsonl"
    return stream


def _lines(source: Source, stream: io.BufferedReader) -> Iterator[tuple[int, Payload]]:
    """Lines that are not blank, without their ends; a byte-order mark at the start is dropped."""
    number = 0
    try:
        while raw := stream.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(raw) > MAX_LINE_BYTES:
                source.records += 1
                where = f"{source.path}:{number}"
                yield number, DataError(f"{where}: found a line above {MAX_LINE_BYTES} bytes")
                while raw and not raw.endswith(b"\n"):
                    raw = stream.readline(MAX_LINE_BYTES)
                continue
            if number == 1:
                raw = raw.removeprefix(codecs.BOM_UTF8)
            line = raw.strip(b"\r\n\t ")
            if line:
                source.records += 1
                yield number, line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{source.path}: found damaged gzip data after line {number} ({error})"
        ) from None
    if number == 0:
        raise DataError(f"{source.path}: found an empty input, expected JSON lines")


def _rows(source: Source, keys: Sequence[str]) -> Iterator[tuple[int, Payload]]:
    """Rows of a Parquet file: the values under `keys`."""
    if source.size is None:
        raise DataError(f"{source.path}: found Parquet in a pipe, expected a file")
    parquet = _library("pyarrow.parquet", source.path, "Parquet")
    arrow = _library("pyarrow", source.path, "Parquet")
    number = 0
    try:
        with parquet.ParquetFile(source.path) as file:
            names = file.schema_arrow.names
            if missing := [key for key in keys if key not in names]:
                found = ", ".join(map(repr, names[:8]))
                raise DataError(f"{source.path}: column {missing[0]!r} is missing, found {found}")
            total = max(file.metadata.num_rows, 1)
            for batch in file.iter_batches(1024, columns=list(dict.fromkeys(keys))):
                columns = [batch.column(key).to_pylist() for key in keys]
                for row in zip(*columns, strict=True):
                    number += 1
                    source.records += 1
                    source.num_bytes = source.size * number // total
                    yield number, row
    except (arrow.ArrowException, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{source.path}: found damaged Parquet data ({reason})") from None
    source.num_bytes = source.size
    digest = hashlib.sha256()
    with open(source.path, "rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    source.sha256 = digest.hexdigest()


def _library(name: str, path: Path, what: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.split(".")[0]
        raise DataError(
            f"{path}: {what} needs the package {package}: pip install {package}"
        ) from None
