"""Folders that appear whole or not at all: filled beside their name, synced, then renamed.

A conversion that fails or is interrupted removes what it wrote; one that is killed leaves at most a
hidden `.NAME.PID.tmp`, which no reader opens.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megasparse.errors import StorageError


def require_empty(path: Path) -> None:
    """Refuse an output that is there already; said before any work is done.

    Raises:
        StorageError: exists and is not an empty folder.
    """
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise StorageError(f"{path}: is no folder, expected a new or empty one")
    if path.is_dir() and any(path.iterdir()):
        raise StorageError(f"{path}: is not empty, expected a new or empty folder")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends without an error.

    Raises:
        StorageError: `path` is not empty, or cannot be written. The block must itself convert
            errors of what it reads.
    """
    require_empty(path)
    path = path.absolute()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        _sync(temporary)
        os.rename(temporary, path)  # over an empty folder, if there is one
        _sync(path.parent)
    except OSError as error:
        raise StorageError(f"{path}: cannot write: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_free_space(folder: Path, needed: int) -> None:
    """Refuse to begin to write what the disk has no room for.

    Raises:
        StorageError: tells need and room in bytes.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StorageError(f"{folder}: no room: {free} bytes free, {needed} needed")


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
