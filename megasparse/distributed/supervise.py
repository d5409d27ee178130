"""Start a failed run again from its last checkpoint, under any launcher.

With `--max-restarts` each rank's process is a small parent that imports nothing heavy and runs the
training as its child. When a rank dies, all children end (the watchdog sees to that); rank 0's
parent decides whether to go on and announces the next attempt in a file of the run's folder. One
parent of each host, its leader, looks at that file and tells the others (`host_line.py`), and
leaves a note there when a rank of its host has failed. A child that is stopped or stuck is killed
when its attempt is over, and one that waits for a rank that died before they met, soon after that.
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
from megasparse.distributed.environment import ATTEMPT, LAUNCH, launch_identity, launch_number
from megasparse.distributed.host_line import HostLine
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
from megasparse.input_files import read_regular
from megasparse.log import logger

# Another start would end the same way, or is the scheduler's business.
FINAL_CODES = {
    0, EXIT_PREEMPTED, ConfigError.exit_code, DataError.exit_code, CheckpointError.exit_code,
    KernelError.exit_code, PreflightError.exit_code,
}  # fmt: skip
POLL_SECONDS = 0.1  # of the child, and of what others on this host say
BOARD_SECONDS = 1.0  # of files that hosts share, by one process of each host
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
        self._stale = self._read()
        self._attempt, self._looked = 0, 0.0
        self._failed: set[int] = set()  # attempts in which a rank's child has failed
        self._noted: set[int] = set()  # those that other hosts know of
        self._order: dict[str, Any] = {}  # rank 0's newest that is known here
        self._child: subprocess.Popen[bytes] | None = None
        self._stopped = stopped
        self._libc = ctypes.CDLL(None)
        launch = launch_identity()
        self._line = HostLine(f"{self._board.absolute()} {launch['meeting']} {launch['launch']}")
        handle(self._forward)

    def run(self) -> int:
        try:
            return self._run()
        finally:
            self._line.close()

    def _run(self) -> int:
        idle, newest = 0, -1
        if self._rank == 0:
            # At once: a rank of this job that fails soon leaves such a note, too.
            for note in self._board.parent.glob(f"{self._board.name}.failed-*"):
                note.unlink()
            self._announce({"attempt": 0})
            newest = self._newest()
        while True:
            code = self._run_child()
            if code in FINAL_CODES:
                if self._rank == 0:
                    self._announce({"exit": code})
                return code
            self._say({"failed": self._attempt})
            if self._stopped:
                return EXIT_PREEMPTED
            if self._rank:
                order = self._wait_for_order()
                if "exit" in order:
                    return int(order["exit"])
                self._attempt = int(order["attempt"])
                continue
            idle = 0 if self._newest() > newest else idle + 1
            newest = max(newest, self._newest())
            final = self._over(code, idle)
            if final is not None:
                self._announce({"exit": final})
                return final
            self._attempt += 1
            logger.warning(
                "exit code %d; restart %d of %d from step %s",
                code,
                self._attempt,
                self._settings.max_restarts,
                newest if newest >= 0 else "0 (none)",
            )
            self._announce({"attempt": self._attempt})

    def _over(self, code: int, idle: int) -> int | None:
        """The exit code with which to give up, if so."""
        limit = self._settings.max_restarts_without_progress
        if idle >= limit:
            logger.error("%d failures in a row without a new checkpoint: giving up", idle)
            return EXIT_NO_PROGRESS
        if self._attempt >= self._settings.max_restarts:
            logger.error("exit code %d after %d restarts: giving up", code, self._attempt)
            return code
        return None

    def _run_child(self) -> int:
        environment = {**os.environ, _SUPERVISED: "1", ATTEMPT: str(self._attempt)}
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
            self._listen()
            if self._rank == 0 and self._attempt in self._failed:
                failed = failed or time.monotonic()
                if time.monotonic() - failed >= MEETING_SECONDS:
                    self._child.kill()
            if self._is_over(self._order):
                ordered = ordered or time.monotonic()
                # After a regular end a child ends by itself; stuck ones are not waited for.
                grace = ANNOUNCEMENT_SECONDS if self._order.get("exit") in FINAL_CODES else 0.0
                if time.monotonic() - ordered >= grace:
                    self._child.kill()
        return 128 - code if code < 0 else code

    def _wait_for_order(self) -> dict[str, Any]:
        end = time.monotonic() + ANNOUNCEMENT_SECONDS
        while time.monotonic() < end and not self._stopped:
            if self._is_over(self._order):
                return self._order
            self._listen()
        return {"exit": EXIT_PREEMPTED if self._stopped else PeerError.exit_code}

    def _listen(self) -> None:
        """Wait a moment, for what others of this host say and, as its leader, other hosts."""
        for message in self._line.hear(POLL_SECONDS):
            self._take(message)
        self._note_failures()
        if time.monotonic() - self._looked < BOARD_SECONDS:
            return
        self._looked = time.monotonic()
        if self._rank == 0:
            if self._note(self._attempt).exists():
                self._failed.add(self._attempt)
        elif self._line.leads:
            order = self._read()
            # What an earlier job left is no order; a first attempt may be this job's.
            is_stale = order == self._stale and order.get("attempt") != 0
            if order and not is_stale and order != self._order:
                self._say({"order": order})

    def _say(self, message: dict[str, Any]) -> None:
        """Tell the other supervisors of this host, and take it up here."""
        self._line.say(message)
        self._take(message)
        self._note_failures()

    def _take(self, message: dict[str, Any]) -> None:
        if "order" in message:
            self._order = message["order"]
        if "failed" in message:
            self._failed.add(message["failed"])

    def _note_failures(self) -> None:
        """The leader of a host: let rank 0 know, if it is on another one."""
        if not self._rank or not self._line.leads:
            return
        for attempt in self._failed - self._noted:
            self._noted.add(attempt)
            try:
                self._require_own()
                self._note(attempt).touch()
            except StorageError as error:  # another run has the folders; the children have said so
                self._say({"order": {"exit": error.exit_code}})

    def _is_over(self, order: dict[str, Any]) -> bool:
        """Whether an order ends this attempt."""
        return bool(self._rank) and ("exit" in order or order.get("attempt", 0) > self._attempt)

    def _note(self, attempt: int) -> Path:
        """There once the child of a rank on another host has failed in this attempt."""
        return self._board.with_name(f"{self._board.name}.failed-{attempt}")

    def _announce(self, order: dict[str, Any]) -> None:
        order = {**order, "nonce": secrets.token_hex(8)}
        write_json(self._board, order)
        self._say({"order": order})

    def _read(self) -> dict[str, Any]:
        try:
            order = json.loads(read_regular(self._board, 1 << 20))
        except (OSError, ValueError, RecursionError):
            return {}
        return order if isinstance(order, dict) else {}

    def _forward(self, number: int, _: FrameType | None) -> None:
        self._stopped = True
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(number)
