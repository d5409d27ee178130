"""Why a run ends: which rank is at fault, from the beats of all ranks. No thread, no store here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist

from megasparse.distributed.descriptors import is_exhausted
from megasparse.errors import PeerError

GRACE_SECONDS = 1.0  # between the first rank that is late and the one that it waits for

# Collectives of torch.distributed that a rank may wait in.
_NAMES = {
    "all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast",
    "barrier", "all_to_all_single", "send", "recv", "reduce",
    "gather", "scatter", "monitored_barrier",
}  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """Why the run ends: the first failing rank's words and exit code."""

    rank: int
    message: str
    exit_code: int


def longest(silent: list[tuple[float, Verdict] | None]) -> Verdict | None:
    """The verdict on the rank that has been silent longest."""
    found = [entry for entry in silent if entry is not None]
    return max(found, key=lambda entry: entry[0])[1] if found else None


def hang(
    beats: Sequence[dict[str, Any]] | Mapping[int, dict[str, Any]],
    world: int | None = None,
    grace: float = GRACE_SECONDS,
) -> Verdict | None:
    """The verdict on the rank that holds up the others, once a rank is late.

    Of the late ranks that wait in no collective it is the one that has come least far.

    Args:
        beats: by rank; those of ranks that are not late may be missing.
        world: number of ranks; None: there are no others.
        grace: seconds until the beats of all ranks that are late are here.
    """
    if not isinstance(beats, Mapping):
        beats = dict(enumerate(beats))
    world = len(beats) if world is None else world
    late = sorted(rank for rank, beat in beats.items() if beat["late"])
    if not late:
        return None
    busy = [rank for rank in late if beats[rank]["collective"] is None]
    late_for = max(beats[rank]["late_for"] for rank in late)
    if len(late) < world and late_for < grace:
        return None  # the others are about to be late, too: who waits for whom is known then
    busy = busy or late
    culprit = min(busy, key=lambda rank: beats[rank]["ticks"])
    beat = beats[culprit]
    others = {b["collective"] for b in beats.values() if b["late"] and b["collective"]}
    waiting = f"; others wait in {', '.join(sorted(others))}" if others and world > 1 else ""
    message = (
        f"rank {culprit} hangs in {beat['phase']} for {beat['seconds']:.0f} s at {beat['where']}"
        f"{waiting}"
    )
    return Verdict(culprit, message, PeerError.exit_code)


def place_of(frame: FrameType | None) -> tuple[str, str | None]:
    """Where a thread is: its innermost frame, and the collective that it waits in, if any.

    Args:
        frame: the innermost one; None: unknown.
    """
    if frame is None:
        return "unknown", None
    name = Path(frame.f_code.co_filename).name
    here, collective = f"{name}:{frame.f_lineno} {frame.f_code.co_name}", None
    while frame is not None:
        if "torch/distributed/" in frame.f_code.co_filename and frame.f_code.co_name in _NAMES:
            collective = frame.f_code.co_name
        frame = frame.f_back
    return here, collective


def is_communication_error(error: BaseException) -> bool:
    """Whether an exception comes from a lost connection, not from a fault of this rank."""
    if is_exhausted(error):
        return False
    text = str(error)
    signs = ("peer", "gloo", "NCCL", "Broken pipe", "Timed out", "Connection re", "timeout")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(sign in text for sign in signs)
    )
