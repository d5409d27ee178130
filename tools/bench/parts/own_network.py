"""A network of one process and its children, in which nothing else is counted."""

from __future__ import annotations

import ctypes
import fcntl
import socket
import struct
from pathlib import Path

_CLONE_NEWNET = 0x40000000


def own_network() -> bool:
    """Move this process into a network namespace with nothing but loopback; whether it may."""
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET):
        return False
    with socket.socket() as probe:
        request = struct.pack("16sh", b"lo", 0x41)  # up and running
        fcntl.ioctl(probe, 0x8914, request)  # SIOCSIFFLAGS
    return True


def traffic() -> tuple[int, int]:
    """Bytes and packets that loopback has carried."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == "lo":
            return int(counts.split()[0]), int(counts.split()[1])
    return 0, 0
