"""Files that appear whole or not at all: written beside their name, synced, then renamed.

A killed writer leaves at most a hidden `.<name>.<pid>.tmp`, which no reader opens.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from megasparse.errors import DataError


def temporary_path(path: Path) -> Path:
    """The name under which `path` is written, in the same directory so that a rename is atomic."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def write_error(path: Path, error: OSError) -> DataError:
    """The one-line error for a file that cannot be written (disk full, no permission, ...)."""
    return DataError(f"{path}: cannot write: {error.strerror or error}")


def read_error(path: Path, error: OSError) -> DataError:
    """The one-line error for a file that cannot be read (missing, a directory, ...)."""
    return DataError(f"{path}: cannot read: {error.strerror or error}")


def make_parent(path: Path) -> None:
    """Create the directory of `path`; if a file is in its place, opening `path` says so."""
    if not path.parent.exists():
        path.parent.mkdir(parents=True, exist_ok=True)


def sync(stream: BinaryIO) -> None:
    """Flush `stream` to the disk."""
    stream.flush()
    os.fsync(stream.fileno())


def discard(path: Path) -> None:
    """Remove a temporary file if it is there; an error on the way is in nobody's interest."""
    with suppress(OSError):
        path.unlink()


def sync_directory(directory: Path) -> None:
    """Flush the entries of `directory`, so that a rename survives a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file that becomes `path` when the block ends without an error.

    Parent directories are created.

    Raises:
        DataError: the file cannot be written. The block must itself convert errors of what it
            reads, since every `OSError` out of it is taken as a failure to write.
    """
    temporary = temporary_path(path)
    try:
        make_parent(path)
        with open(temporary, "wb") as stream:
            yield stream
            sync(stream)
        os.replace(temporary, path)
        sync_directory(path.parent)
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        discard(temporary)
