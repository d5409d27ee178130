"""Files that somebody else made: regular ones alone, of a size that fits, and no link elsewhere.

A pipe or a device in a file's place would be waited for or read for ever. All errors are OSErrors
with a reason for people, so what handles a missing file handles these too.
"""

from __future__ import annotations

import errno
import os
import reprlib
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

# Of configurations and other descriptions; tensors and tokens are read piece by piece.
MAX_TEXT_BYTES = 1 << 28

_short = reprlib.Repr()
_short.maxlevel, _short.maxlist, _short.maxdict, _short.maxtuple = 3, 4, 4, 4
_short.maxstring = _short.maxother = _short.maxlong = 80


def shown(value: Any) -> str:
    """A value for a message: its `repr`, shortened where it is long or deep."""
    try:
        return _short.repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits
        return f"a value of type {type(value).__name__}"


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """A regular file, open for reading; never waits.

    Raises:
        OSError: it cannot be opened, or is a folder, a pipe, a device or a socket.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
        if not stat.S_ISREG(mode):
            reason = "is a pipe, a device or a socket, expected a regular file"
            raise OSError(errno.EINVAL, reason, os.fspath(path))
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: str | os.PathLike, limit: int = MAX_TEXT_BYTES) -> bytes:
    """The whole content of a regular file.

    Args:
        limit: bytes that it may have.

    Raises:
        OSError: as `open_regular`, or it is longer.
    """
    with open_regular(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        content = stream.read() if size <= limit else b""
    if max(size, len(content)) > limit:
        raise OSError(errno.EFBIG, f"longer than {limit} bytes", os.fspath(path))
    return content


def refuse_links(folder: Path, error: Callable[[str], Exception]) -> None:
    """Refuse a folder with links to files outside of it: their content was not asked for.

    The links of a Hugging Face cache, from `snapshots/REVISION` to `blobs`, are its own.

    Raises:
        error: names the link and where it leads.
    """
    inside = [os.path.realpath(folder)]
    if folder.absolute().parent.name == "snapshots":
        inside.append(os.path.realpath(folder.absolute().parent.parent / "blobs"))
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(parent, name)
            if not os.path.islink(path):
                continue
            target = os.path.realpath(path)
            if not any(os.path.commonpath([target, place]) == place for place in inside):
                raise error(f"{path}: a link to {target}, outside of the folder; copy the file")
