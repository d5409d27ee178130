"""Faults on demand, so that every promise about them can be tested on whole runs.

`MEGASPARSE_FAULT=kind@rank:step:point[,...]` is read once, when a run starts. `rank` and `step` may
be `*`; `step` counts optimizer steps done; `point` is one of `POINTS`. Kinds:

    kill        SIGKILL this process            exception   raise RuntimeError
    stop        SIGSTOP this process            enospc      raise OSError(ENOSPC)
    term        SIGTERM this process            nan, inf    poison the value at the point, always
    hang        sleep for ever                  nan-once    poison it the first time only
    huge        multiply the value by 1e30

A fault strikes in the first start of a job only, with `!` after the kind after every restart too.
`nan`, `inf` and `huge` act where a value passes: `loss`, or `grad/PART-OF-A-PARAMETER'S-NAME`.
"""

from __future__ import annotations

import errno
import math
import os
import signal
import time
from dataclasses import dataclass, field

from megasparse.errors import ConfigError

VARIABLE = "MEGASPARSE_FAULT"
POISONS = {"nan": math.nan, "inf": math.inf, "huge": 1e30}
KINDS = ("kill", "stop", "term", "hang", "exception", "enospc", *POISONS, "nan-once")
POINTS = (
    "build", "index", "load", "model", "report",
    "data", "forward", "backward", "optimizer", "step_end", "evaluate",
    "save:begin", "save:file", "save:sync", "save:manifest", "save:rename", "save:pointer",
    "save:prune", "loss",
)  # fmt: skip
GRADIENT = "grad/"


@dataclass
class Fault:
    """One fault; None for rank or step: any."""

    kind: str
    rank: int | None
    step: int | None
    point: str
    fired: bool = field(default=False, compare=False)


class Faults:
    """The faults of this process.

    Args:
        faults: parsed.
        rank: of this process.
    """

    def __init__(self, faults: list[Fault], rank: int) -> None:
        self._faults = [f for f in faults if f.rank in (None, rank)]

    def passed(self, point: str, step: int, micro_batch: int = 0) -> None:
        """Let happen what is to happen at this point of a step; a listener of `Events`."""
        for fault in self._faults:
            if fault.point == point and fault.step in (None, step) and not fault.fired:
                fault.fired = True
                _strike(fault)

    def poison(self, point: str, step: int) -> float | None:
        """NaN, infinity or what else the value at this point is to be multiplied by, if any."""
        for fault in self._faults:
            if fault.point != point or fault.step not in (None, step):
                continue
            if fault.kind in POISONS or (fault.kind == "nan-once" and not fault.fired):
                fault.fired = True
                return POISONS[fault.kind.removesuffix("-once")]
        return None

    def poisoned_gradients(self) -> list[str]:
        """Parts of the names of parameters whose gradient is to be poisoned at some step."""
        return [
            fault.point.removeprefix(GRADIENT)
            for fault in self._faults
            if fault.point.startswith(GRADIENT)
        ]


def parse(text: str) -> list[Fault]:
    """The faults that a value of the variable names.

    Raises:
        ConfigError: malformed.
    """
    faults = []
    for part in filter(None, text.split(",")):
        kind, at, place = part.partition("@")
        always, kind = kind.endswith("!"), kind.removesuffix("!")
        rank, _, rest = place.partition(":")
        step, _, point = rest.partition(":")
        known = point in POINTS or point.startswith(GRADIENT)
        if not at or kind not in KINDS or not known or not (_number(rank) and _number(step)):
            raise ConfigError(f"{VARIABLE}: found {part!r}, expected kind@rank:step:point")
        if always or os.environ.get("MEGASPARSE_ATTEMPT", "0") == "0":
            numbers = [None if number == "*" else int(number) for number in (rank, step)]
            faults.append(Fault(kind, numbers[0], numbers[1], point))
    return faults


def from_environment(rank: int) -> Faults:
    """The faults that the environment asks for; usually none."""
    return Faults(parse(os.environ.get(VARIABLE, "")), rank)


def _number(text: str) -> bool:
    return text == "*" or text.isdecimal()


def _strike(fault: Fault) -> None:
    where = f"injected by {VARIABLE} at {fault.point}"
    if fault.kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault.kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault.kind == "term":
        os.kill(os.getpid(), signal.SIGTERM)
    elif fault.kind == "hang":
        while True:
            time.sleep(3600)
    elif fault.kind == "exception":
        raise RuntimeError(f"exception {where}")
    elif fault.kind == "enospc":
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} ({where})")
