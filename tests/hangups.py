"""Tests that send SIGHUP, also when the suite itself runs under `nohup`."""

from __future__ import annotations

import signal


def heed_hangups() -> None:
    """Undo `nohup`, in a process that a test starts: processes below `nohup` ignore SIGHUP."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
