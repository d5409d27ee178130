"""One writer a folder: a lock that a crash cannot leave behind.

The right to write is a POSIX record lock on `.lock`, which the system releases when its process
ends, however it ends, and which network file systems carry to other hosts. A lock on the folder
itself stands beside it, so that a second writer is refused even if somebody deletes `.lock`. The
file says who holds it. Where a file system keeps locks to each host, the owner's name and the
time of its last sign of life decide; both times are read from the file system's own clock.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from megasparse.checkpoint.lock_owner import (
    NAME,
    REFRESH_SECONDS,
    Owner,
    Record,
    describe,
    look,
    own_record,
    owner_of,
    read,
    same_file,
    write,
)
from megasparse.errors import StorageError
from megasparse.log import logger

# Within this time an owner has written who it is.
NOTE_SECONDS = 1.0


class FolderLock:
    """The right to write into a folder, held until `release` or the end of the process.

    A thread renews the time of `.lock`, and puts the file back if it is deleted.

    Args:
        folder: exists.

    Raises:
        StorageError: another run holds it; names host, process, job, and when it is free.
    """

    def __init__(self, folder: Path) -> None:
        self.path, self._folder = folder / NAME, folder
        self._lost: str | None = None
        self._over = threading.Event()
        self._guard = threading.Lock()
        self._folder_descriptor = self._lock_folder()
        try:
            self._descriptor = self._lock_file()
        except BaseException:
            self._close_folder()
            raise
        self._record = own_record()
        write(self._descriptor, self._record)
        self._thread = threading.Thread(target=self._refresh, name="lock", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Make sure that the folder is still this run's.

        Raises:
            StorageError: another run has taken it over, while this one showed no sign of life.
        """
        with self._guard:
            if not self._over.is_set():
                self._keep()
        if self._lost is not None:
            raise StorageError(f"{self._folder}: {self._lost}")

    def release(self) -> None:
        """Let others write; leaves no file behind."""
        with self._guard:
            if self._over.is_set():
                return
            self._over.set()
            if self._lost is None:
                with suppress(OSError):
                    if same_file(self._descriptor, self.path):
                        self.path.unlink()
            os.close(self._descriptor)
            self._close_folder()

    def _lock_folder(self) -> int | None:
        """Lock the folder itself, where that is possible."""
        try:
            descriptor = os.open(self._folder, os.O_DIRECTORY)
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be locked: {error.strerror}") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise StorageError(_owner_by_name(self._folder).refusal(self._folder)) from None
        except OSError:  # network file systems lock no folders
            os.close(descriptor)
            return None
        # A forked child (a data worker) would keep the lock if it outlived this process.
        os.register_at_fork(after_in_child=self._close_folder)
        return descriptor

    def _close_folder(self) -> None:
        descriptor, self._folder_descriptor = getattr(self, "_folder_descriptor", None), None
        if descriptor is not None:
            with suppress(OSError):
                os.close(descriptor)

    def _lock_file(self) -> int:
        """The locked file's descriptor."""
        while True:
            try:
                descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            except OSError as error:
                raise StorageError(f"{self.path}: cannot be locked: {error.strerror}") from None
            try:
                self._take(descriptor)
            except BaseException:
                os.close(descriptor)
                raise
            if same_file(descriptor, self.path):
                return descriptor
            os.close(descriptor)  # its owner has just let it go, and deleted it

    def _take(self, descriptor: int) -> None:
        owner = look(descriptor, self._folder)
        if owner is None:
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                owner = look(descriptor, self._folder) or Owner(read(descriptor), 0.0, True)
        if owner is not None:
            if owner.ahead:
                # The owner's time counts from now, or the lock of a dead one would never be free.
                with suppress(OSError):
                    os.utime(descriptor)
            raise StorageError(owner.refusal(self._folder))
        if gone := read(descriptor):
            logger.warning(
                "%s: taking over the lock of a run that is gone: %s", self._folder, describe(gone)
            )

    def _refresh(self) -> None:
        """Thread: signs of life, for hosts that do not see the lock itself."""
        while not self._over.wait(REFRESH_SECONDS):
            with self._guard:
                if self._over.is_set():
                    return
                with suppress(OSError):
                    self._keep()

    def _keep(self) -> None:
        """Show a sign of life, unless another run has taken the folder over."""
        if self._lost is not None:
            return
        if same_file(self._descriptor, self.path):
            found = read(self._descriptor)
            if found and found.get("nonce") != self._record["nonce"]:
                self._lost = (
                    f"taken over by {describe(found)}, while this run showed no sign of life"
                )
                return
            os.utime(self._descriptor)
            return
        try:
            descriptor = self._lock_file()
        except StorageError:
            self._lost = "its .lock was deleted, and another run has taken it over"
            return
        logger.warning("%s was deleted or exchanged; put back", self.path)
        os.close(self._descriptor)
        self._descriptor = descriptor
        write(descriptor, self._record)


def _owner_by_name(folder: Path) -> Owner:
    """Who has a folder's lock; an owner whose note was deleted writes it anew within a moment."""
    end = time.monotonic() + 2 * REFRESH_SECONDS
    while True:
        owner = owner_of(folder)
        if owner is not None and owner.record:
            return owner
        if time.monotonic() > end:
            return owner or Owner({}, 0.0, True)
        time.sleep(0.05)


class RunLock:
    """The right to write into all folders of a run, held by its rank 0 or that one's supervisor.

    Args:
        folders: exist; one that is named twice counts once.

    Raises:
        StorageError: another run writes into one of them; none is locked then.
    """

    def __init__(self, folders: list[Path]) -> None:
        self._locks: list[FolderLock] = []
        try:
            for folder in _different(folders):
                self._locks.append(FolderLock(folder))
        except BaseException:
            self.release()
            raise

    def check(self) -> None:
        """As `FolderLock.check`, of all folders."""
        for lock in self._locks:
            lock.check()

    def release(self) -> None:
        """Let others write."""
        for lock in self._locks:
            lock.release()


def require_free(folders: list[Path], ours: Callable[[Record], bool]) -> None:
    """Refuse folders that another run writes into.

    Args:
        ours: whether an owner is this run itself (its rank 0, or the supervisor of that).

    Raises:
        StorageError: names owner, silence, and when the folder is free.
    """
    end = time.monotonic() + NOTE_SECONDS
    for folder in _different(folders):
        while (owner := owner_of(folder)) is not None and not ours(owner.record):
            if not owner.alive or time.monotonic() > end:
                raise StorageError(owner.refusal(folder))
            time.sleep(0.02)  # our rank 0 may have the lock, and not have written yet that it has


def _different(folders: list[Path]) -> list[Path]:
    return list({os.path.realpath(folder): folder for folder in folders}.values())
