"""Finding ranks that died, stopped, hang or failed; and ending the others within seconds.

Every rank has a thread that writes a beat into the store four times a second: that the process
lives, and how far its training thread has come. The thread of rank 0 reads all beats and writes a
verdict; those of the other ranks read the verdict and rank 0's beat. A second thread only watches
the clock, so a store that does not answer is noticed as well. On a verdict a rank dumps its stacks,
logs one line, and exits. Only the stock functions of the store are used, through a connection of
its own, since the training thread may be blocked in another.
"""

from __future__ import annotations

import datetime
import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megasparse.distributed.running_clock import RunningClock
from megasparse.distributed.verdicts import Verdict, hang, longest, place_of
from megasparse.errors import PeerError
from megasparse.log import logger

BEAT_SECONDS = 0.25
SILENT_SECONDS = 10.0  # without a beat: stopped or gone
SUSPECT_SECONDS = 1.2  # the same, once a rank has seen its connections break
CONNECT_TIME = datetime.timedelta(seconds=10)
ANSWER_TIME = datetime.timedelta(seconds=30)
LINGER_SECONDS = 3.0  # rank 0 keeps the store for the others to read why it failed
STARTING = 20.0  # allowance of phases that compile, build or read everything
WRITING = 5.0  # allowance of a save's parts, and of what follows one

# What begins at a point of the run: its words in messages, and the time that it may take, as a
# multiple of the hang timeout; the help of `hang_timeout` states these limits.
PHASES = {
    "build": ("build", STARTING),
    "index": ("index of the samples", STARTING),
    "load": ("load of a checkpoint", STARTING),
    "model": ("build of the model", STARTING),
    "first_step": ("the first step", STARTING),
    "micro_batch": ("step {next}, micro-batch {micro_batch}", 1.0),
    "backward": ("step {next}, backward of micro-batch {micro_batch}", 1.0),
    "evaluate": ("evaluation, micro-batch {micro_batch}", 1.0),
    "evaluated": ("after an evaluation", WRITING),
    "save": ("save of step {step}", WRITING),
    "saved": ("after a save", WRITING),
    "report": ("final report", STARTING),
    "end": ("end of the run", STARTING),
}


class Watchdog:
    """Reports this rank's progress to the other ranks, and watches theirs.

    Args:
        address: host and port of the store; None: one rank alone (`watch_alone`), or ranks that
            someone else watches; nothing runs then.
        prefix: of the keys, different for every start of the job.
        rank, world: of this process.
        hang_timeout: seconds without progress of the training thread; 0: any.
        dump_dir: where stacks are written.
    """

    def __init__(
        self,
        address: tuple[str, int] | None,
        prefix: str,
        rank: int,
        world: int,
        hang_timeout: float,
        dump_dir: Path,
    ) -> None:
        self._rank, self._world, self._limit = rank, world, hang_timeout
        self._silent = min(SILENT_SECONDS, hang_timeout or SILENT_SECONDS)
        self._dump_dir = dump_dir
        self._main = threading.main_thread().ident
        self._clock = RunningClock()
        self._ticks, self._phase, self._allowance = 0, "build", STARTING
        self._ticked = self._contact = self._clock.now()
        self._suspects = self._closing = self._stopped = False
        self._threads: list[threading.Thread] = []
        self._verdict: Verdict | None = None
        self._decided = threading.Event()
        self._seen: dict[int, tuple[Any, float]] = {}
        self._store: dist.Store | None = None
        # Called before this process ends on a verdict.
        self.before_end: Callable[[], object] = lambda: None
        if address is None:
            return
        # The store has just answered: a connection that fails now means that rank 0 is gone.
        client = dist.TCPStore(*address, None, False, CONNECT_TIME, wait_for_workers=False)
        client.set_timeout(ANSWER_TIME)
        self._store = dist.PrefixStore(f"watch-{prefix}", client)
        if rank == 0:
            for key in ("verdict", "failure"):
                self._store.set(key, "")
        self._store.add("suspects", 0)
        self._store.set(f"beat/{rank}", json.dumps(self._beat()))
        self._start(self._exchange, self._await_verdict)

    def _start(self, *targets: Callable[[], object]) -> None:
        for target in targets:
            name = f"watchdog{target.__name__}"
            self._threads.append(threading.Thread(target=target, name=name, daemon=True))
            self._threads[-1].start()

    def watch_alone(self) -> None:
        """One rank alone watches only itself."""
        if self._limit:
            self._start(self._look_at_itself, self._await_verdict)

    def passed(self, point: str, step: int, micro_batch: int = 0) -> None:
        """The training thread has come to a point; a listener of `Events`.

        Points with an entry in `PHASES`, and those of a save, begin a new phase.
        """
        phase, allowance = PHASES.get(point, (None, 0.0))
        if point.startswith("save:"):
            phase, allowance = point, WRITING
        if phase is None:
            return
        self._ticks += 1
        self._phase = phase.format(step=step, next=step + 1, micro_batch=micro_batch)
        self._allowance = allowance
        self._ticked = self._clock.now()

    def fail(self, message: str, exit_code: int) -> None:
        """Record for all ranks that this one fails; the verdict names the first that did."""
        self._closing = True
        if self._store is None:
            return
        record = {"rank": self._rank, "message": message, "code": exit_code}
        try:
            self._store.compare_set("failure", "", json.dumps(record))
        except RuntimeError:
            return  # rank 0 is gone, and the store with it
        if self._rank == 0:
            self._linger(self._world - 1)

    def explain(self, wait: float = 2 * SILENT_SECONDS) -> Verdict | None:
        """What broke this rank's connections, once that is known."""
        self._closing = True
        if self._store is None:
            return None
        self._suspects = True
        self._decided.wait(wait)
        if self._rank == 0 and self._verdict is not None:
            self._linger(self._world - 2)  # without the one that is lost
        return self._verdict

    @property
    def is_alone(self) -> bool:
        """Whether there are no other ranks that read a failure of this one."""
        return self._store is None

    def stop(self) -> None:
        """The run ends well: the threads end, so that none is in the store at the process's end."""
        self._closing = self._stopped = True
        for thread in self._threads:
            thread.join(SILENT_SECONDS)
        self._store = None

    def _linger(self, readers: int) -> None:
        """Rank 0: keep the store until this many ranks have read the verdict."""
        end = time.monotonic() + LINGER_SECONDS
        assert self._store is not None
        while time.monotonic() < end:
            try:
                if self._store.add("seen", 0) >= readers:
                    return
            except RuntimeError:
                return
            time.sleep(0.05)

    def _beat(self) -> dict[str, Any]:
        now = self._clock.now()
        overdue = now - self._ticked if self._limit and self._allowance else 0.0
        late = overdue > self._limit * self._allowance
        beat = {"time": now, "ticks": self._ticks, "phase": self._phase, "late": late}
        if late:
            beat["where"], beat["collective"] = place_of(sys._current_frames().get(self._main or 0))
            beat["seconds"] = round(overdue, 1)
            beat["late_for"] = overdue - self._limit * self._allowance
        return beat

    def _look_at_itself(self) -> None:
        """Thread of a run of one rank: the verdict on itself."""
        while self._verdict is None and not self._stopped:
            self._decide(hang([self._beat()]))
            self._decided.wait(BEAT_SECONDS)

    def _exchange(self) -> None:
        """Thread: write this rank's beat and read the others', until there is a verdict."""
        assert self._store is not None
        told = False
        while self._verdict is None and not self._stopped:
            try:
                self._store.set(f"beat/{self._rank}", json.dumps(self._beat()))
                if self._suspects and not told:
                    told = bool(self._store.add("suspects", 1))
                self._decide(self._look_at_all() if self._rank == 0 else self._look_at_first())
            except (RuntimeError, dist.DistError):
                if self._clock.resumed_within(SILENT_SECONDS) and not self._closing:
                    self._decided.wait(BEAT_SECONDS)  # an answer was due while all were suspended
                    continue
                if not self._closing or self._suspects:
                    self._decide(
                        Verdict(0, "rank 0 was lost: its store is gone", PeerError.exit_code)
                    )
                return
            self._contact = self._clock.now()
            self._decided.wait(BEAT_SECONDS)
        if self._rank and not self._stopped:
            try:
                self._store.add("seen", 1)
            except (RuntimeError, dist.DistError):
                return

    def _await_verdict(self) -> None:
        """Thread: end this rank on a verdict; notice a store that does not answer."""
        while not self._decided.wait(0.1):
            if self._stopped:
                return
            silence = self._clock.now() - self._contact
            if silence > self._silent + BEAT_SECONDS and self._rank:
                self._decide(
                    Verdict(0, f"rank 0 does not answer for {silence:.0f} s", PeerError.exit_code)
                )
        if not self._closing:
            time.sleep(2 * BEAT_SECONDS if self._rank == 0 else 0.0)  # the others shall read it
            if not self._closing:
                self._end()

    def _end(self) -> None:
        assert self._verdict is not None
        logger.error("PeerError: %s; this rank was in %s", self._verdict.message, self._phase)
        self.dump_stacks()
        self.before_end()
        sys.stderr.flush()
        os._exit(self._verdict.exit_code)

    def dump_stacks(self) -> None:
        """Stacks of all threads, to `stacks-rank-N.txt` in the run's folder."""
        path = self._dump_dir / f"stacks-rank-{self._rank:05d}.txt"
        try:
            with open(path, "w", encoding="utf-8") as stream:
                faulthandler.dump_traceback(stream)
            logger.error("stacks of this rank: %s", path)
        except OSError:
            faulthandler.dump_traceback(sys.stderr)

    def _decide(self, verdict: Verdict | None) -> None:
        if verdict is not None and self._verdict is None:
            self._verdict = verdict
            self._decided.set()

    def _look_at_first(self) -> Verdict | None:
        assert self._store is not None
        content, beat = self._store.multi_get(["verdict", "beat/0"])
        if content:
            return Verdict(**json.loads(content))
        return longest([self._silence(0, json.loads(beat), self._silent)])

    def _look_at_all(self) -> Verdict | None:
        """Rank 0: the verdict on a rank that failed, is silent or hangs, written into the store."""
        assert self._store is not None
        keys = [f"beat/{rank}" for rank in range(self._world)]
        if not self._store.check(keys):
            return None  # some have not begun; the rendezvous has its own limit
        failure, *contents = self._store.multi_get(["failure", *keys])
        beats = [json.loads(content) for content in contents]
        limit = SUSPECT_SECONDS if self._store.add("suspects", 0) else self._silent
        verdict = None
        if failure:
            told = json.loads(failure)
            message = f"rank {told['rank']} failed: {told['message']}"
            verdict = Verdict(told["rank"], message, told["code"])
        silent = [self._silence(rank, beats[rank], limit) for rank in range(1, self._world)]
        verdict = verdict or longest(silent) or hang(beats)
        if verdict is not None:
            self._store.set("verdict", json.dumps(verdict.__dict__))
        return verdict

    def _silence(
        self, rank: int, beat: dict[str, Any], limit: float
    ) -> tuple[float, Verdict] | None:
        """How long a rank has been silent, if that is too long."""
        now = self._clock.now()
        last, since = self._seen.get(rank, (None, now))
        if beat["time"] != last:
            self._seen[rank] = (beat["time"], now)
            return None
        if now - since < limit:
            return None
        message = (
            f"rank {rank} was lost in {beat['phase']}: no sign of life for {now - since:.1f} s"
        )
        return now - since, Verdict(rank, message, PeerError.exit_code)
