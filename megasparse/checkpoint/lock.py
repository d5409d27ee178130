"""One writer a folder: a lock that a crash cannot leave behind.

A POSIX record lock on `.lock`, which the system releases when its process ends, however it ends,
and which network file systems carry to other hosts. The file says who holds it. Where a file
system keeps locks to each host, the owner's name and the time of its last `refresh` decide.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from megasparse.errors import StorageError
from megasparse.log import logger

NAME = ".lock"
STALE_SECONDS = 120.0


class FolderLock:
    """The right to write into a folder, held until `release` or the end of the process.

    The file must not be opened by anything else in this process: closing it would drop the lock.

    Args:
        folder: exists.

    Raises:
        StorageError: another run holds it; names host, process and job.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        try:
            self._descriptor = os.open(
                self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
            )
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be locked: {error.strerror}") from None
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            owner = self._read()
            os.close(self._descriptor)
            raise StorageError(f"{folder}: another run writes here: {_describe(owner)}") from None
        self._take_over(folder)

    def _take_over(self, folder: Path) -> None:
        owner = self._read()
        age = time.time() - os.fstat(self._descriptor).st_mtime
        here, job = socket.gethostname(), os.environ.get("SLURM_JOB_ID")
        start = os.environ.get("SLURM_RESTART_COUNT", "0")
        # A job that was queued again may start on other nodes at once: its start before is over.
        ours_before = job is not None and owner.get("job") == job and owner.get("start") != start
        elsewhere = owner.get("host") not in (None, here) and not ours_before
        if owner and elsewhere and age < STALE_SECONDS:
            os.close(self._descriptor)
            raise StorageError(
                f"{folder}: another run writes here: {_describe(owner)}, last seen {age:.0f} s ago"
            )
        if owner:
            logger.warning(
                "%s: taking over the lock of a run that is gone: %s", folder, _describe(owner)
            )
        record = {
            "host": here,
            "pid": os.getpid(),
            "job": job,
            "start": start,
            "since": time.strftime("%Y-%m-%dT%H:%M:%S"),
        }
        self._write(json.dumps(record).encode())

    def refresh(self) -> None:
        """Renew the time of the file, for hosts that do not see the lock itself."""
        os.utime(self._descriptor)

    def release(self) -> None:
        """Let others write."""
        self._write(b"")
        os.close(self._descriptor)

    def _read(self) -> dict[str, Any]:
        try:
            owner = json.loads(os.pread(self._descriptor, 4096, 0))
        except (OSError, ValueError):
            return {}
        return owner if isinstance(owner, dict) else {}

    def _write(self, content: bytes) -> None:
        try:
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, content, 0)
        except OSError:  # a full disk takes the note of who it is, not the lock
            pass


def _describe(owner: dict[str, Any]) -> str:
    job = f", job {owner['job']}" if owner.get("job") else ""
    return f"process {owner.get('pid', '?')} on {owner.get('host', '?')}{job}"
