"""A command as if on another host, of a file system that keeps locks to each host.

python -m tests.reliability.other_host launch/pretrain.py [flags]
"""

from __future__ import annotations

import fcntl
import runpy
import socket
import struct
import sys
from pathlib import Path
from typing import Any

from megasparse.checkpoint import lock_owner

_control = fcntl.fcntl


def _no_lock_seen(descriptor: Any, command: int, argument: Any = 0) -> Any:
    if command != fcntl.F_GETLK:
        return _control(descriptor, command, argument)
    return struct.pack(lock_owner._FLOCK, fcntl.F_UNLCK, 0, 0, 0, 0)


if __name__ == "__main__":
    socket.gethostname = lambda: "elsewhere"
    lock_owner._BOOT = Path("/dev/null")  # no host has this boot
    fcntl.fcntl = _no_lock_seen
    fcntl.lockf = fcntl.flock = lambda *_: None
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
