"""Finding ranks that died, stopped, hang or failed; and ending the others within seconds.

Every rank has a thread that writes a beat into its host's store four times a second: that the
process lives, and how far its training thread has come. The leader of the host (`hosts.py`) reads
them, sees which processes are gone, and once a second tells rank 0 what it has found; rank 0 leads
its own host. Rank 0 writes the verdict, the leaders hand it on, the other ranks read it and their
leader's beat. A second thread only watches the clock, so a store that does not answer is noticed as
well. On a verdict a rank dumps its stacks, logs one line, and exits. Only the stock functions of
the store are used, through a connection of its own, since the training thread may be blocked in
another.
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

from megasparse.distributed.hosts import HostChannel, host_identity, is_starved, join_host
from megasparse.distributed.leaders import (
    BEAT_SECONDS,
    REPORT_SECONDS,
    SILENT_SECONDS,
    Leader,
    Look,
    Silence,
    enter,
    report,
)
from megasparse.distributed.phases import PHASES, STARTING, WRITING
from megasparse.distributed.running_clock import RunningClock
from megasparse.distributed.verdicts import Verdict, hang, longest, place_of
from megasparse.errors import PeerError
from megasparse.log import logger

CONNECT_TIME = datetime.timedelta(seconds=10)
ANSWER_TIME = datetime.timedelta(seconds=30)
# For the verdict on who broke the connections: twice as long as a suspect on a starved host gets.
EXPLAIN_SECONDS = 2 * SILENT_SECONDS
LINGER_SECONDS = 3.0  # rank 0 keeps the store for the others to read why it failed


class Watchdog:
    """Reports this rank's progress to the other ranks, and watches theirs.

    Args:
        address: host and port of the store; None: one rank alone (`watch_alone`), or ranks that
            someone else watches; nothing runs then.
        prefix: of the keys, different for every start of the job.
        rank, world: of this process.
        hang_timeout: seconds without progress of the training thread; 0: any.
        dump_dir: where stacks are written.
        host: what the processes of this host, and no others, have in common.
    """

    def __init__(
        self,
        address: tuple[str, int] | None,
        prefix: str,
        rank: int,
        world: int,
        hang_timeout: float,
        dump_dir: Path,
        host: str | None = None,
    ) -> None:
        self._rank, self._world, self._limit = rank, world, hang_timeout
        self._dump_dir = dump_dir
        self._main = threading.main_thread().ident
        self._clock = RunningClock()
        limit = min(SILENT_SECONDS, hang_timeout or SILENT_SECONDS)
        self._silence = Silence(limit, self._clock.now)
        self._ticks, self._phase, self._allowance = 0, "build", STARTING
        self._ticked = self._contact = self._clock.now()
        self._suspects = self._closing = self._stopped = False
        self._threads: list[threading.Thread] = []
        self._verdict: Verdict | None = None
        self._decided = threading.Event()
        self._reported, self._alarm = 0.0, False
        self._look_reported: Look | None = None
        self._keepers_beat: dict[str, Any] = {}  # of the rank whose store this one talks to
        self._leader: Leader | None = None
        self._channel: HostChannel | None = None
        self._store: dist.Store | None = None
        # Called before this process ends on a verdict.
        self.before_end: Callable[[], object] = lambda: None
        if address is None:
            return
        self._prefix = f"watch-{prefix}"
        # The store has just answered: a connection that fails now means that rank 0 is gone.
        main = self._connect(*address)
        if rank == 0:
            main.set("alarm", "")
            self._leader = Leader(main, rank, self._beat(), self._silence)
        channel = join_host(main, rank, host or host_identity(), self._connect)
        if rank and channel.leader == rank:
            self._leader = Leader(channel.store, rank, self._beat(), self._silence)
        self._channel, self._store = channel, channel.store
        self._store.set(f"beat/{rank}", json.dumps(self._beat()))
        enter(channel.store, "member", rank)
        if channel.up is not None:
            assert self._leader is not None
            self._report(channel.up, self._leader.look(alarm=False))
            enter(channel.up, "leader", rank)
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

        Points with an entry in `PHASES`, and those of a save, begin a new phase. A background save
        passes its points in a thread of its own: the training thread is elsewhere.
        """
        if threading.get_ident() != self._main:
            return
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
            return  # the leader is gone, and the store with it
        if self._leader is not None:
            self._linger(self._leader.readers(self._rank))

    def explain(self, wait: float = EXPLAIN_SECONDS) -> Verdict | None:
        """What broke this rank's connections, once that is known."""
        self._closing = True
        if self._store is None:
            return None
        self._suspects = True
        end = self._clock.now() + wait
        while not self._decided.wait(0.1) and self._clock.now() < end:
            pass
        if self._leader is not None and self._verdict is not None:
            self._linger(self._leader.readers(self._verdict.rank))
        return self._verdict

    @property
    def is_alone(self) -> bool:
        """Whether there are no other ranks that read a failure of this one."""
        return self._store is None

    def stop(self) -> None:
        """The run ends well: the threads end, so that none is in the store at the process's end.

        A leader keeps the store of its host until its process ends.
        """
        self._closing = self._stopped = True
        for thread in self._threads:
            thread.join(SILENT_SECONDS)
        self._store = None

    def _connect(self, host: str, port: int) -> dist.Store:
        client = dist.TCPStore(host, port, None, False, CONNECT_TIME, wait_for_workers=False)
        client.set_timeout(ANSWER_TIME)
        return dist.PrefixStore(self._prefix, client)

    def _linger(self, readers: int) -> None:
        """A leader: keep the store until this many ranks have read the verdict."""
        end = self._clock.now() + LINGER_SECONDS
        assert self._store is not None
        while self._clock.now() < end:
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
        beat |= {"pid": os.getpid(), "starved": is_starved()}
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
        assert self._store is not None and self._channel is not None
        told = False
        while self._verdict is None and not self._stopped:
            try:
                self._store.set(f"beat/{self._rank}", json.dumps(self._beat()))
                if self._suspects and not told:
                    told = bool(self._store.add("suspects", 1))
                self._decide(self._look())
            except (RuntimeError, dist.DistError):
                if self._clock.resumed_within(SILENT_SECONDS) and not self._closing:
                    self._decided.wait(BEAT_SECONDS)  # an answer was due while all were suspended
                    continue
                if not self._closing or self._suspects:
                    lost = self._keeper
                    message = f"rank {lost} was lost: its store is gone"
                    self._decide(Verdict(lost, message, PeerError.exit_code))
                break
            self._contact = self._clock.now()
            self._decided.wait(BEAT_SECONDS)
        if self._rank and not self._stopped and self._verdict is not None:
            self._hand_on(self._verdict)

    def _look(self) -> Verdict | None:
        """What this rank can know: rank 0 of all, a leader of its host, others of their leader."""
        assert self._store is not None and self._channel is not None
        if self._leader is None:
            return self._read_verdict(self._store)
        if self._rank == 0:
            look = self._leader.look_at_hosts(self._leader.look(self._alarm), self._alarm)
            if look.suspects and not self._alarm:
                self._alarm = True
                self._store.set("alarm", "1")
            verdict = self._leader.verdict(look, self._world)
            if verdict is not None:
                self._store.set("verdict", json.dumps(verdict.__dict__))
            return verdict
        up = self._channel.up
        assert up is not None
        news = self._leader.look(self._alarm)
        if news == self._look_reported and time.monotonic() - self._reported < REPORT_SECONDS:
            return None
        self._report(up, news)
        self._alarm = up.get("alarm") != b""
        return self._read_verdict(up)

    def _report(self, up: dist.Store, look: Look) -> None:
        """A leader: tell rank 0 how the ranks of this host are."""
        self._reported, self._look_reported = time.monotonic(), look
        up.set(f"report/{self._rank}", report(look, self._beat()))

    def _read_verdict(self, store: dist.Store) -> Verdict | None:
        """The verdict in a store, or one on the rank that keeps it and is silent."""
        content, beat = store.multi_get(["verdict", f"beat/{self._keeper}"])
        if content:
            return Verdict(**json.loads(content))
        self._keepers_beat = json.loads(beat)
        local = self._leader is None
        alarm = self._alarm or self._suspects
        return longest([self._silence.of(self._keeper, self._keepers_beat, local, alarm)])

    def _hand_on(self, verdict: Verdict) -> None:
        """For the ranks that read this one's store; and tell the keeper of the other one.

        Who keeps a store may end once those that read it have seen the verdict.
        """
        assert self._store is not None and self._channel is not None
        for act in (
            lambda s: s.set("verdict", json.dumps(verdict.__dict__)) if self._leader else None,
            lambda s: (self._channel.up or s).add("seen", 1),  # type: ignore[union-attr]
        ):
            try:
                act(self._store)
            except (RuntimeError, dist.DistError):
                continue

    @property
    def _keeper(self) -> int:
        """The rank whose store this one talks to."""
        assert self._channel is not None
        return self._channel.leader if self._leader is None else 0

    def _await_verdict(self) -> None:
        """Thread: end this rank on a verdict; notice a store that does not answer."""
        while not self._decided.wait(0.1):
            if self._stopped:
                return
            silence = self._clock.now() - self._contact
            if self._rank and silence > self._silence.limit + BEAT_SECONDS:
                local = self._leader is None and bool(self._keepers_beat)
                alarm = self._alarm or self._suspects
                patience = self._silence.patience(self._keepers_beat, local, alarm)
                if silence > patience + BEAT_SECONDS:
                    message = f"rank {self._keeper} does not answer for {silence:.0f} s"
                    self._decide(Verdict(self._keeper, message, PeerError.exit_code))
        if not self._closing:
            if self._leader is not None:  # the others shall read it
                assert self._verdict is not None
                self._linger(self._leader.readers(self._verdict.rank))
                time.sleep(2 * BEAT_SECONDS)
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
