"""One writer a folder: a lock that a crash cannot leave behind.

The right to write is a POSIX record lock on `.lock`, which the system releases when its process
ends, however it ends, and which network file systems carry to other hosts. A lock on the folder
itself stands beside it, so that a second writer is refused even if somebody deletes `.lock`. The
file says who holds it. Where a file system keeps locks to each host, the owner's name and the
time of its last sign of life decide; both times are read from the file system's own clock.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megasparse.distributed.environment import launch_identity
from megasparse.errors import StorageError
from megasparse.log import logger

NAME = ".lock"
STALE_SECONDS = 120.0
REFRESH_SECONDS = 2.0
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_FLOCK = "hhqqi4x"  # struct flock of 64-bit Linux

Record = dict[str, Any]


@dataclass(frozen=True)
class Owner:
    """Who writes into a folder.

    Attributes:
        record: what `.lock` says; may be empty.
        silent: seconds since its last sign of life.
        alive: its process certainly exists.
        ahead: seconds by which its time stamp lies in the future; 0 if it does not.
    """

    record: Record
    silent: float
    alive: bool
    ahead: float = 0.0

    def refusal(self, folder: Path) -> str:
        """The line for a second writer: who, silent for how long, and when it may take over."""
        line = f"{folder}: another run writes here: {describe(self.record)}"
        if self.record.get("since"):
            line += f", since {self.record['since']}"
        line += f", last seen {self.silent:.0f} s ago"
        if self.ahead:
            line += f" (its time stamp lay {self.ahead:.0f} s in the future)"
        if self.alive:
            return f"{line}; its process is alive, the folder is free once it has ended"
        left = max(STALE_SECONDS - self.silent, 1.0)
        return (
            f"{line}; the folder may be taken over after {STALE_SECONDS:.0f} s without a sign of "
            f"life, in {left:.0f} s"
        )


def describe(record: Record) -> str:
    """An owner in words."""
    job = f", job {record['job']}" if record.get("job") else ""
    return f"process {record.get('pid', '?')} on {record.get('host', '?')}{job}"


def owner_of(folder: Path) -> Owner | None:
    """Who writes into a folder now, without taking or disturbing its lock; None: nobody.

    Not to be called by a process that holds the lock: closing the file would drop it.
    """
    try:
        descriptor = os.open(folder / NAME, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return _look(descriptor, folder)
    finally:
        os.close(descriptor)


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
        self._record = _own_record()
        _write(self._descriptor, self._record)
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
                    if _same_file(self._descriptor, self.path):
                        self.path.unlink()
            os.close(self._descriptor)
            self._close_folder()

    def _lock_folder(self) -> int | None:
        """Lock the folder itself, where that is possible."""
        try:
            descriptor = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be locked: {error.strerror}") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            owner = owner_of(self._folder) or Owner({}, 0.0, True)
            raise StorageError(owner.refusal(self._folder)) from None
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
                descriptor = os.open(
                    self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
                )
            except OSError as error:
                raise StorageError(f"{self.path}: cannot be locked: {error.strerror}") from None
            try:
                self._take(descriptor)
            except BaseException:
                os.close(descriptor)
                raise
            if _same_file(descriptor, self.path):
                return descriptor
            os.close(descriptor)  # its owner has just let it go, and deleted it

    def _take(self, descriptor: int) -> None:
        owner = _look(descriptor, self._folder)
        if owner is None:
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                owner = _look(descriptor, self._folder) or Owner(_read(descriptor), 0.0, True)
        if owner is not None:
            if owner.ahead:
                # The owner's time counts from now, or the lock of a dead one would never be free.
                with suppress(OSError):
                    os.utime(descriptor)
            raise StorageError(owner.refusal(self._folder))
        if gone := _read(descriptor):
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
        if _same_file(self._descriptor, self.path):
            found = _read(self._descriptor)
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
        _write(descriptor, self._record)


def _look(descriptor: int, folder: Path) -> Owner | None:
    """Who holds an open `.lock`, if anybody does or may."""
    record = _read(descriptor)
    age = _now(folder) - os.fstat(descriptor).st_mtime
    ahead = -age if age < -REFRESH_SECONDS else 0.0
    silent = max(age, 0.0)
    request = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    try:
        held = struct.unpack(_FLOCK, fcntl.fcntl(descriptor, fcntl.F_GETLK, request))
    except OSError:  # no locks here at all: the record decides
        held = (fcntl.F_UNLCK,)
    if held[0] != fcntl.F_UNLCK:
        return Owner(record, silent, True, ahead)
    if not record or _is_here(record) or _is_earlier_start(record) or silent >= STALE_SECONDS:
        return None
    return Owner(record, silent, False, ahead)


def _is_here(record: Record) -> bool:
    """Whether the owner is of this host; its process is gone then, or it would hold the lock."""
    if record.get("boot"):
        return record["boot"] == _boot()
    return record.get("host") in (None, socket.gethostname())


def _is_earlier_start(record: Record) -> bool:
    """Whether it is this Slurm job before it was queued again, perhaps on other nodes."""
    job = os.environ.get("SLURM_JOB_ID")
    start = os.environ.get("SLURM_RESTART_COUNT", "0")
    return job is not None and record.get("job") == job and record.get("start") != start


def _own_record() -> Record:
    return {
        "host": socket.gethostname(),
        "boot": _boot(),
        "pid": os.getpid(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "start": os.environ.get("SLURM_RESTART_COUNT", "0"),
        "since": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "nonce": secrets.token_hex(8),
        **launch_identity(),
    }


def _boot() -> str | None:
    try:
        return _BOOT.read_text().strip()
    except OSError:
        return None


def _now(folder: Path) -> float:
    """The time by the clock of the file system that a folder is on, which other hosts use too."""
    probe = folder / f".probe-{os.getpid()}-{threading.get_ident()}"
    try:
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
    except OSError:
        return time.time()
    return now


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except OSError:
        return False


def _read(descriptor: int) -> Record:
    try:
        owner = json.loads(os.pread(descriptor, 4096, 0))
    except (OSError, ValueError, RecursionError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _write(descriptor: int, record: Record) -> None:
    # A full disk takes the note of who it is, not the lock.
    with suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(record).encode(), 0)


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
    for folder in _different(folders):
        owner = owner_of(folder)
        if owner is not None and not ours(owner.record):
            raise StorageError(owner.refusal(folder))


def _different(folders: list[Path]) -> list[Path]:
    return list({folder.resolve(): folder for folder in folders}.values())
