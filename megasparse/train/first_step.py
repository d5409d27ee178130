"""A bar over the first step of a start: kernels are compiled and GEMMs tuned in it, for minutes."""

from __future__ import annotations

from typing import Any

from megasparse.log import is_logging_rank
from megasparse.progress import progress

# Where a part of the step has ended: a forward pass, a backward pass, the last one, the update.
_ENDS = ("backward", "micro_batch", "optimizer", "step_end")
_BEGIN = ("micro_batch", 0)


class FirstStepBar:
    """A listener of events that shows how far the first step is; gone when it has ended.

    Args:
        micro_batches: of a rank in the step.
    """

    def __init__(self, micro_batches: int) -> None:
        self._micro_batches = micro_batches
        self._bar: Any = None

    def __call__(self, point: str, step: int, micro_batch: int) -> None:
        if point == "first_step":
            self._bar = progress(
                desc="first step",
                total=2 * self._micro_batches + 1,
                unit="pass",
                enabled=is_logging_rank(),
                leave=False,
            )
        elif self._bar is not None and point in _ENDS and (point, micro_batch) != _BEGIN:
            self._bar.update(1)
            if point == "step_end":
                self._bar.close()
                self._bar = None
