"""Where the time of a step goes: spans by name, without waiting for the device.

Each moment of a measured step belongs to the innermost open span alone, so the phases add up to the
step. On a GPU a change of phase is an event in the stream, read when a later step asks: what is
measured is the time of the stream, and communication counts where it is not hidden by computation.
On the CPU it is the clock.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, TypeVar

import torch

T = TypeVar("T")

PHASES = ("data", "forward", "backward", "optimizer", "preparation", "communication", "other")

# Methods of torch's process groups that move data, and the wait for them: all collectives of
# megasparse, Megatron and DeepSpeed pass through here.
_COLLECTIVES = (
    "allreduce", "allreduce_coalesced", "allgather", "_allgather_base",
    "allgather_into_tensor_coalesced", "reduce", "reduce_scatter", "_reduce_scatter_base",
    "reduce_scatter_tensor_coalesced", "broadcast", "alltoall", "alltoall_base", "send", "recv",
    "barrier",
)  # fmt: skip


class StepTimer:
    """Spans of one step after the other; costs next to nothing while it is not measuring.

    Args:
        device: where the run computes; None: the CPU.

    Attributes:
        measuring: between `start` and `stop`.
        named: give phases names that a profiler shows.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._cuda = device is not None and device.type == "cuda"
        self.measuring = self.named = False
        self._names: list[contextlib.AbstractContextManager[Any]] = []
        self._stack: list[str] = []
        self._marks: list[tuple[str, Any]] = []
        self._finished: list[tuple[str, Any]] = []
        self._spare: list[Any] = []
        self._undo: list[Callable[[], None]] = []

    def start(self) -> None:
        """Measure from here."""
        self._marks = []
        self._stack = ["other"]
        self.measuring = True
        self._undo = [
            *(_timed(self, torch.distributed.ProcessGroup, name) for name in _COLLECTIVES),
            _timed(self, torch.distributed.Work, "wait"),
        ]
        self._mark()

    def stop(self) -> None:
        """The end of the step."""
        if not self.measuring:
            return
        self._mark()
        self.measuring = False
        self._finished = self._marks
        for undo in self._undo:
            undo()
        self._undo = []

    def span(self, phase: str) -> contextlib.AbstractContextManager[Any]:
        """What happens inside belongs to `phase`, one of PHASES."""
        return _Span(self, phase) if self.measuring else _NOTHING

    def waiting_for(self, items: Iterable[T]) -> Iterator[T]:
        """The items; the time to get each belongs to "data"."""
        iterator = iter(items)
        while True:
            with self.span("data"):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def take(self) -> list[tuple[str, Any]]:
        """What was measured last and not taken yet, for `seconds`; empty when there is nothing."""
        marks, self._finished = self._finished, []
        return marks

    def seconds(self, marks: list[tuple[str, Any]]) -> dict[str, float]:
        """Seconds by phase of what `take` gave; once. Waits for the device if it is not done."""
        if not marks:
            return {}
        if self._cuda:
            for _, moment in marks:  # of whichever stream was current
                moment.synchronize()
        seconds = dict.fromkeys(PHASES, 0.0)
        for (phase, begin), (_, end) in zip(marks, marks[1:]):
            passed = begin.elapsed_time(end) / 1e3 if self._cuda else end - begin
            seconds[phase] += max(passed, 0.0)  # two streams may be out of order
        self._spare += [moment for _, moment in marks] if self._cuda else []
        return seconds

    def enter(self, phase: str) -> None:
        """From here on time belongs to `phase`, until `leave` (see `span`)."""
        if self.named:
            self._names.append(named(phase))
            self._names[-1].__enter__()
        self._stack.append(phase)
        self._mark()

    def leave(self) -> None:
        """Back to the phase before the last `enter`."""
        self._stack.pop()
        self._mark()
        if self._names:
            self._names.pop().__exit__(None, None, None)

    def _mark(self) -> None:
        if self._cuda:
            moment = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)
            moment.record()
        else:
            moment = time.perf_counter()
        self._marks.append((self._stack[-1], moment))


class _Span:
    def __init__(self, timer: StepTimer, phase: str) -> None:
        self._timer, self._phase = timer, phase

    def __enter__(self) -> None:
        self._timer.enter(self._phase)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._timer.leave()


_NOTHING = contextlib.nullcontext()


@contextlib.contextmanager
def named(name: str) -> Iterator[None]:
    """A range that torch's profiler and, on a GPU, nsys show under this name."""
    nvtx = torch.cuda.is_available()
    if nvtx:
        torch.cuda.nvtx.range_push(name)
    try:
        with torch.profiler.record_function(name):
            yield
    finally:
        if nvtx:
            torch.cuda.nvtx.range_pop()


def _timed(timer: StepTimer, owner: type, name: str) -> Callable[[], None]:
    """Let a method's calls be "communication" until the function that comes back is called."""
    if name not in vars(owner):  # another version of torch
        return lambda: None
    # The descriptor itself: what getattr gives would not bind again.
    descriptor, function = vars(owner)[name], getattr(owner, name)

    def method(*args: Any, **options: Any) -> Any:
        with timer.span("communication"):
            return function(*args, **options)

    setattr(owner, name, method)
    return lambda: setattr(owner, name, descriptor)
