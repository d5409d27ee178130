"""Who writes into a folder: what `.lock` says, and whether that is still true."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import socket
import struct
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megasparse.distributed.environment import launch_identity

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
        descriptor = os.open(folder / NAME, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        return look(descriptor, folder)
    finally:
        os.close(descriptor)


def look(descriptor: int, folder: Path) -> Owner | None:
    """Who holds an open `.lock`, if anybody does or may."""
    record = read(descriptor)
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


def own_record() -> Record:
    """What this process says of itself."""
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


def same_file(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except OSError:
        return False


def read(descriptor: int) -> Record:
    """What an open `.lock` says; nothing if it is damaged."""
    try:
        owner = json.loads(os.pread(descriptor, 4096, 0))
    except (OSError, ValueError, RecursionError):
        return {}
    return owner if isinstance(owner, dict) else {}


def write(descriptor: int, record: Record) -> None:
    """Say who holds an open `.lock`."""
    # A full disk takes the note of who it is, not the lock.
    with suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(record).encode(), 0)
