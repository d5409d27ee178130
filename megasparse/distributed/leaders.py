"""What the leader of a host sees of its ranks, and rank 0 of all: beats in, a verdict out.

A leader reads the beats of its own host and reports to rank 0 once a second. A report has what is
not as it should be, so it is as short for eight ranks as for a hundred. Silence
alone does not make a lost rank: where the leader sees that the process lives, it waits three times
as long, since a process that is starved of its core is silent as well; where the process is gone it
waits for half a second.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from megasparse.distributed.hosts import is_starved, process_state
from megasparse.distributed.verdicts import GRACE_SECONDS, Verdict, hang, longest
from megasparse.errors import PeerError

BEAT_SECONDS = 0.25
REPORT_SECONDS = 1.0  # from one report of a host's leader to the next
SILENT_SECONDS = 10.0  # without a beat: stopped or gone
SUSPECT_SECONDS = 1.2  # the same, once a rank has seen its connections break
GONE_SECONDS = 2 * BEAT_SECONDS  # the same, where the process is seen to be gone
PATIENCE = 3.0  # times the first, for a process that lives or a host that is overloaded

Beat = dict[str, Any]


@dataclass
class Look:
    """What is known of a group of ranks.

    Attributes:
        count: ranks that have begun.
        failure: JSON of the first rank that failed by itself; "": none.
        silent: how long the most silent rank has been silent, and the verdict on it.
        late: beats of the ranks that are late.
        suspects: ranks that have seen their connections break.
    """

    count: int
    failure: str = ""
    silent: tuple[float, Verdict] | None = None
    late: dict[int, Beat] = field(default_factory=dict)
    suspects: int = 0


class Silence:
    """How long other ranks have been silent, by this process's clock.

    Args:
        limit: seconds after which a rank that is not seen to live is lost.
        clock: of this process, in seconds.
    """

    def __init__(self, limit: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit, self._clock = limit, clock
        self._seen: dict[int, tuple[Any, float]] = {}

    def of(
        self, rank: int, beat: Beat, local: bool, alarm: bool = False
    ) -> tuple[float, Verdict] | None:
        """How long a rank has been silent, if that is too long.

        Args:
            local: whether its process is one of this host.
            alarm: whether connections have been seen to break.
        """
        now = self._clock()
        last, since = self._seen.get(rank, (None, now))
        if beat["time"] != last:
            self._seen[rank] = (beat["time"], now)
            return None
        if now - since < self.patience(beat, local, alarm):
            return None
        message = (
            f"rank {rank} was lost in {beat['phase']}: no sign of life for {now - since:.1f} s"
        )
        return now - since, Verdict(rank, message, PeerError.exit_code)

    def patience(self, beat: Beat, local: bool, alarm: bool = False) -> float:
        """How long the rank of a beat may be silent."""
        if not local:
            times = PATIENCE if beat.get("starved") or is_starved() else 1.0
            suspect = SUSPECT_SECONDS + 2 * REPORT_SECONDS
            return times * (min(self.limit, suspect) if alarm else self.limit)
        state = process_state(beat["pid"])
        if state == "gone":
            return GONE_SECONDS
        if state == "alive":
            return self.limit * PATIENCE
        return SUSPECT_SECONDS if alarm else self.limit


class Leader:
    """The ranks of this host, and on rank 0 the leaders of the others.

    Args:
        store: of the host.
        rank: the leader's own.
        beat: its first one.
    """

    def __init__(self, store: dist.Store, rank: int, beat: Beat, silence: Silence) -> None:
        self._store, self._rank, self._silence = store, rank, silence
        self._members: list[int] = []
        self._leaders: list[int] = []
        for key in ("verdict", "failure"):  # what is read must be there
            store.set(key, "")
        store.add("suspects", 0)
        store.set(f"beat/{rank}", json.dumps(beat))

    def readers(self, lost: int) -> int:
        """Other ranks that read a verdict from this one's store.

        Args:
            lost: rank that will not.
        """
        return len({*self._members, *self._leaders} - {self._rank, lost})

    def look(self, alarm: bool) -> Look:
        """At the ranks of this host."""
        _add_entered(self._store, "member", self._members)
        keys = [f"beat/{rank}" for rank in self._members]
        failure, *contents = self._store.multi_get(["failure", *keys])
        beats = dict(zip(self._members, map(json.loads, contents), strict=True))
        silent = [
            self._silence.of(rank, beat, True, alarm)
            for rank, beat in beats.items()
            if rank != self._rank
        ]
        return Look(
            len(beats),
            failure.decode(),
            max(filter(None, silent), default=None, key=lambda entry: entry[0]),
            {rank: beat for rank, beat in beats.items() if beat["late"]},
            self._store.add("suspects", 0),
        )

    def look_at_hosts(self, own: Look, alarm: bool) -> Look:
        """Rank 0: its own host and the reports of all others."""
        _add_entered(self._store, "leader", self._leaders)
        if not self._leaders:
            return own
        contents = self._store.multi_get([f"report/{rank}" for rank in self._leaders])
        silent = [own.silent]
        for rank, report in zip(self._leaders, map(json.loads, contents), strict=True):
            silent.append(self._silence.of(rank, report, False, alarm))
            if (told := report["silent"]) is not None:
                silent.append((told[0], Verdict(**told[1])))
            own.count += report["count"]
            own.failure = own.failure or report["failure"]
            own.late |= {int(late): beat for late, beat in report["late"].items()}
            own.suspects += report["suspects"]
        own.silent = max(filter(None, silent), default=None, key=lambda entry: entry[0])
        return own

    def verdict(self, look: Look, world: int) -> Verdict | None:
        """Rank 0: on a rank that failed, is silent or, once all have begun, hangs."""
        if look.failure:
            told = json.loads(look.failure)
            message = f"rank {told['rank']} failed: {told['message']}"
            return Verdict(told["rank"], message, told["code"])
        grace = GRACE_SECONDS + (2 * REPORT_SECONDS if self._leaders else 0.0)
        if look.silent is not None or look.count < world:
            return longest([look.silent])
        return hang(look.late, world, grace)


def report(look: Look, beat: Beat) -> str:
    """What a leader tells rank 0: its own beat, and what is not as it should be on its host."""
    silent = None
    if look.silent is not None:
        silent = [look.silent[0], look.silent[1].__dict__]
    return json.dumps(
        {
            "time": beat["time"],
            "phase": beat["phase"],
            "starved": beat["starved"],
            "count": look.count,
            "failure": look.failure,
            "silent": silent,
            "late": look.late,
            "suspects": look.suspects,
        }
    )


def enter(store: dist.Store, kind: str, rank: int) -> None:
    """Make a rank known to the one that leads a store's ranks, as a "member" or a "leader"."""
    number = store.add(f"{kind}s", 1)
    store.set(f"{kind}/{number}", str(rank))


def _add_entered(store: dist.Store, kind: str, known: list[int]) -> None:
    """Add to the known ranks those that have entered since."""
    come = store.add(f"{kind}s", 0)
    while len(known) < come:
        key = f"{kind}/{len(known) + 1}"
        if not store.check([key]):
            return
        known.append(int(store.get(key)))
