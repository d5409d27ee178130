"""Start a failed run again from its last checkpoint, under any launcher.

With `--max-restarts` each rank's process is a small parent that imports nothing heavy and runs the
training as its child. When a rank dies, all children end (the watchdog sees to that); rank 0's
parent decides whether to go on and announces the next attempt in a file of the run's folder, which
the other parents wait for. A child that is stopped or stuck is killed when its attempt is over,
and one that waits for a rank that died before they met, soon after that.
"""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from megasparse.atomic_files import write_json
from megasparse.config import ResolvedCheckpoint
from megasparse.distributed.environment import ATTEMPT, LAUNCH, launch_number
from megasparse.distributed.signals import StopRequest, handle
from megasparse.errors import (
    EXIT_NO_PROGRESS,
    EXIT_PREEMPTED,
    CheckpointError,
    ConfigError,
    DataError,
    KernelError,
    PeerError,
    PreflightError,
    StorageError,
)
from megasparse.log import logger

# Another start would end the same way, or is the scheduler's business.
FINAL_CODES = {
    0, EXIT_PREEMPTED, ConfigError.exit_code, DataError.exit_code, CheckpointError.exit_code,
    KernelError.exit_code, PreflightError.exit_code,
}  # fmt: skip
POLL_SECONDS = 0.1
ANNOUNCEMENT_SECONDS = 120.0
MEETING_SECONDS = 15.0  # the watchdog of ranks that have met is quicker
_SUPERVISED = "MEGASPARSE_SUPERVISED"
_PR_SET_PDEATHSIG = 1


def is_supervised() -> bool:
    """Whether this process is the child of a supervisor."""
    return _SUPERVISED in os.environ


def supervise(
    settings: ResolvedCheckpoint,
    command: Sequence[str],
    rank: int,
    newest_step: Callable[[], int],
    require_own: Callable[[], object] = lambda: None,
    stop: StopRequest | None = None,
) -> int:
    """Run the command as a child, again while that makes sense.

    Args:
        settings: limits and folders of the run.
        command: this rank's own; `--resume` is added.
        rank: of this process; rank 0 decides.
        newest_step: of the checkpoints so far; -1: none.
        require_own: raises if another run has the folders by now: notes of restarts are its own.
        stop: signals that came before this.

    Returns:
        The exit code of the last attempt, or EXIT_NO_PROGRESS.
    """
    stopped = stop is not None and stop.reason(None) != 0
    return _Supervisor(settings, command, rank, newest_step, require_own, stopped).run()


class _Supervisor:
    def __init__(
        self,
        settings: ResolvedCheckpoint,
        command: Sequence[str],
        rank: int,
        newest_step: Callable[[], int],
        require_own: Callable[[], object],
        stopped: bool,
    ) -> None:
        self._settings, self._rank = settings, rank
        self._command = [*command, "--resume"]
        self._newest, self._require_own = newest_step, require_own
        self._board = Path(settings.run_dir) / ".attempt.json"
        self._child: subprocess.Popen[bytes] | None = None
        self._stopped = stopped
        self._libc = ctypes.CDLL(None)
        handle(self._forward)

    def run(self) -> int:
        stale = self._read()
        if self._rank == 0:
            # At once: a rank of this job that fails soon leaves such a note, too.
            for note in self._board.parent.glob(f"{self._board.name}.failed-*"):
                note.unlink()
            self._announce({"attempt": 0})
            stale = {}
        attempt, idle, newest = 0, 0, self._newest()
        while True:
            code = self._run_child(attempt, stale)
            if self._rank and code not in FINAL_CODES:
                try:
                    self._require_own()
                except StorageError:  # the child has said so
                    return code
            if code not in FINAL_CODES:
                self._note(attempt).touch()
            if code in FINAL_CODES:
                if self._rank == 0:
                    self._announce({"exit": code})
                return code
            if self._stopped:
                return EXIT_PREEMPTED
            if self._rank:
                order = self._wait_for_order(attempt, stale)
                if "exit" in order:
                    return int(order["exit"])
                attempt = int(order["attempt"])
                continue
            idle = 0 if self._newest() > newest else idle + 1
            newest = max(newest, self._newest())
            final = self._over(code, attempt, idle)
            if final is not None:
                self._announce({"exit": final})
                return final
            attempt += 1
            logger.warning(
                "exit code %d; restart %d of %d from step %s",
                code,
                attempt,
                self._settings.max_restarts,
                newest if newest >= 0 else "0 (none)",
            )
            self._announce({"attempt": attempt})

    def _over(self, code: int, attempt: int, idle: int) -> int | None:
        """The exit code with which to give up, if so."""
        limit = self._settings.max_restarts_without_progress
        if idle >= limit:
            logger.error("%d failures in a row without a new checkpoint: giving up", idle)
            return EXIT_NO_PROGRESS
        if attempt >= self._settings.max_restarts:
            logger.error("exit code %d after %d restarts: giving up", code, attempt)
            return code
        return None

    def _run_child(self, attempt: int, stale: dict[str, Any]) -> int:
        environment = {**os.environ, _SUPERVISED: "1", ATTEMPT: str(attempt)}
        environment[LAUNCH] = str(launch_number())
        parent = os.getpid()

        def die_with_parent() -> None:
            self._libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(1)

        self._child = subprocess.Popen(self._command, env=environment, preexec_fn=die_with_parent)
        if self._stopped:
            self._child.send_signal(signal.SIGTERM)
        ordered: float | None = None
        failed: float | None = None
        while (code := self._child.poll()) is None:
            time.sleep(POLL_SECONDS)
            if self._rank == 0 and self._note(attempt).exists():
                failed = failed or time.monotonic()
                if time.monotonic() - failed >= MEETING_SECONDS:
                    self._child.kill()
            order = self._read() if self._rank else {}
            if self._is_newer(order, attempt, stale):
                ordered = ordered or time.monotonic()
                # After a regular end a child ends by itself; stuck ones are not waited for.
                grace = ANNOUNCEMENT_SECONDS if order.get("exit") in FINAL_CODES else 0.0
                if time.monotonic() - ordered >= grace:
                    self._child.kill()
        return 128 - code if code < 0 else code

    def _note(self, attempt: int) -> Path:
        """There once any rank's child has failed in this attempt."""
        return self._board.with_name(f"{self._board.name}.failed-{attempt}")

    def _wait_for_order(self, attempt: int, stale: dict[str, Any]) -> dict[str, Any]:
        end = time.monotonic() + ANNOUNCEMENT_SECONDS
        while time.monotonic() < end and not self._stopped:
            order = self._read()
            if self._is_newer(order, attempt, stale):
                return order
            time.sleep(POLL_SECONDS)
        return {"exit": EXIT_PREEMPTED if self._stopped else PeerError.exit_code}

    def _is_newer(self, order: dict[str, Any], attempt: int, stale: dict[str, Any]) -> bool:
        """Whether an order is of this job and ends the attempt."""
        if not order or order == stale and stale.get("attempt") != 0:
            return False
        return "exit" in order or order.get("attempt", 0) > attempt

    def _announce(self, order: dict[str, Any]) -> None:
        write_json(self._board, {**order, "nonce": secrets.token_hex(8)})

    def _read(self) -> dict[str, Any]:
        try:
            order = json.loads(self._board.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return order if isinstance(order, dict) else {}

    def _forward(self, number: int, _: FrameType | None) -> None:
        self._stopped = True
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(number)
