"""Files and folders that appear whole or not at all: written beside their name, synced, renamed.

A killed writer leaves at most a hidden `.NAME.PID.tmp`, which no reader opens. After a return the
content is on the disk, and so is the name: both survive a power cut.

What cannot be written raises OSError, or the class that the caller gives as `error`, with one line
`PATH: cannot write: REASON`. This module knows no error class of the project.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

ErrorClass = Callable[[str], Exception]


def temporary_path(path: Path) -> Path:
    """The name under which `path` is written, in the same folder so that a rename is atomic."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def temporaries_of(path: Path) -> list[Path]:
    """What killed writers of `path` have left, whatever their process."""
    return sorted(path.parent.glob(f".{path.name}.*.tmp"))


def discard(path: Path) -> None:
    """Remove a temporary file if it is there; nobody needs to know of an error on the way."""
    with suppress(OSError):
        path.unlink()


def sync(stream: BinaryIO) -> None:
    """Flush an open file to the disk."""
    stream.flush()
    os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk, so that a rename survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def synced(path: Path) -> Iterator[BinaryIO]:
    """A new file under its own name, on the disk when the block ends.

    For files of a folder that has its final name only later; all others are `replacing`.
    """
    with open(path, "wb") as stream:
        yield stream
        sync(stream)


@contextmanager
def replacing(path: Path, error: ErrorClass | None = None) -> Iterator[BinaryIO]:
    """A temporary file that becomes `path` when the block ends without an error.

    Parent folders are created.

    Raises:
        OSError, or `error`: the file cannot be written. With `error` the block must itself convert
            errors of what it reads: every OSError out of it is taken as a failure to write.
    """
    temporary = temporary_path(path)
    with _converted(path, error):
        try:
            # A file in the folder's place: opening the temporary file says so.
            if not path.parent.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
            with synced(temporary) as stream:
                yield stream
            rename(temporary, path)
        finally:
            discard(temporary)


def write_text(path: Path, text: str, error: ErrorClass | None = None) -> None:
    """A whole file of UTF-8 text, as `replacing`."""
    with replacing(path, error) as stream:
        stream.write(text.encode("utf-8"))


def write_json(
    path: Path, value: Any, indent: int | None = None, error: ErrorClass | None = None
) -> None:
    """A whole JSON file that ends with a newline, as `replacing`."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n", error)


def rename(source: Path, target: Path) -> None:
    """Give a synced file or folder its name, and sync the folder that it is in.

    Raises:
        OSError: among others, `target` is a folder that is not empty.
    """
    os.replace(source, target)
    sync_folder(target.parent)


def require_empty(folder: Path, error: ErrorClass) -> None:
    """Refuse an output folder that is there already, before any work is done.

    Raises:
        error: it exists and is not an empty folder.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise error(f"{folder}: is no folder, expected a new or empty one")
    if folder.is_dir() and any(folder.iterdir()):
        raise error(f"{folder}: is not empty, expected a new or empty folder")


@contextmanager
def new_folder(folder: Path, error: ErrorClass) -> Iterator[Path]:
    """A temporary folder that becomes `folder` when the block ends without an error.

    What was written is removed if the block fails.

    Raises:
        error: `folder` is not empty, or cannot be written. The block must itself convert errors of
            what it reads.
    """
    require_empty(folder, error)
    folder = folder.absolute()
    temporary = temporary_path(folder)
    with _converted(folder, error):
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            yield temporary
            sync_folder(temporary)
            rename(temporary, folder)  # over an empty folder, if there is one
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def check_free_space(folder: Path, needed: int, error: ErrorClass, of: str = "") -> None:
    """Refuse to begin to write what the disk has no room for.

    Args:
        folder: exists.
        needed: bytes.
        of: what is to be written, for the message.

    Raises:
        error: names need and room in bytes.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        wanted = f" for {of}" if of else ""
        raise error(f"{folder}: no room{wanted}: {free} bytes free, {needed} needed")


@contextmanager
def _converted(path: Path, error: ErrorClass | None) -> Iterator[None]:
    """An OSError of the block as `error`, in one line."""
    try:
        yield
    except OSError as failure:
        if error is None:
            raise
        raise error(f"{path}: cannot write: {failure.strerror or failure}") from failure
