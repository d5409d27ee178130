"""The one-line errors of data files that the system refuses."""

from __future__ import annotations

from pathlib import Path

from megasparse.errors import DataError


def write_error(path: Path, error: OSError) -> DataError:
    """The error of a file that cannot be written (disk full, no permission, ...)."""
    return DataError(f"{path}: cannot write: {error.strerror or error}")


def read_error(path: Path, error: OSError) -> DataError:
    """The error of a file that cannot be read (missing, a directory, ...)."""
    return DataError(f"{path}: cannot read: {error.strerror or error}")
