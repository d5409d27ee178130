"""When all ranks stop: reasons are exchanged between steps, rarely where there are many ranks.

An exchange takes 2 log N messages one after the other, some milliseconds at ten thousand ranks. So
it takes place at every step up to 1,023 ranks, at every second one from 1,024 on, and at every 17th
at 16,384: that is the longest delay of a stop, and of the publication of a background save.
"""

from __future__ import annotations

from dataclasses import dataclass

from megasparse.distributed.control_plane import ControlPlane
from megasparse.distributed.signals import StopRequest

RANKS_A_STEP = 1024


def agreement_interval(world: int) -> int:
    """Steps, or micro-batches of an evaluation, from one exchange to the next."""
    return 1 + world // RANKS_A_STEP


@dataclass(frozen=True)
class Agreed:
    """What all ranks know between two steps.

    Attributes:
        reason: to stop, 0: none (`signals.describe` has the words).
        writing: whether a background save is at work on some rank.
    """

    reason: int
    writing: bool


class Agreement:
    """The reasons of all ranks to stop.

    Args:
        control: of all ranks.
        stop: this rank's reasons.
        duration: minutes after which the run ends; None: any.

    Attributes:
        interval: steps from one exchange to the next.
    """

    def __init__(
        self, control: ControlPlane, stop: StopRequest, duration: float | None = None
    ) -> None:
        self._control, self._stop, self._duration = control, stop, duration
        self.interval = agreement_interval(control.world)

    def at_step(self, step: int, writing: bool) -> Agreed | None:
        """Exchange reasons before a step, a collective call; None: not at this step.

        Args:
            writing: whether a background save is at work on this rank.
        """
        if step % self.interval:
            return None
        reason = self._stop.reason(self._duration)
        # The time limit is sent as the largest value: a signal and it are both a reason.
        timed_out, number, at_work = self._control.max_over_ranks(
            [int(reason < 0), max(reason, 0), int(writing)]
        )
        return Agreed(number or -timed_out, bool(at_work))

    def in_evaluation(self, micro_batch: int) -> bool:
        """Whether a signal ends the evaluation before this micro-batch; a collective call."""
        if micro_batch % self.interval:
            return False
        return any(self._control.max_over_ranks([max(self._stop.reason(None), 0)]))
