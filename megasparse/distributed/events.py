"""The points that a rank passes, as one channel between the code that passes them and listeners.

Listeners are the watchdog (what begins now, and how long it may take) and, in tests, the fault
injector. The points, in the order of a run:

    build               the ranks have met
    index               the indices of the samples are about to be built
    load                a checkpoint is about to be looked for, and later to be read
    model               the model is about to be built
    first_step          the first step of this start of the run
    micro_batch         a micro-batch of a step or, in a pipeline, its forward pass
    data, forward, backward, optimizer
                        what a step does next; data is read on the first and last stage alone
    step_end            a step was done and recorded
    evaluate            a micro-batch of an evaluation
    tasks               rank 0 prepares or judges tasks of an evaluation, others wait for it
    evaluated           an evaluation has ended
    save                a save is about to begin
    save:NAME           a point within a save: begin, file, sync, manifest, rename, pointer, prune
    saved               a save has ended, or its background part has begun
    report              the final report
    end                 this rank has nothing more to do and waits for the others
"""

from __future__ import annotations

from typing import Protocol


class Listener(Protocol):
    """What is called at every point, in the thread that passes it."""

    def __call__(self, point: str, step: int, micro_batch: int) -> None:
        """A rank has come to a point.

        Args:
            point: its name.
            step: optimizer steps done.
            micro_batch: number within the step or the evaluation on this rank; 0 elsewhere.
        """


class Events:
    """Calls each listener at every point, in order.

    Args:
        listeners: none in benchmarks and tests of parts.
    """

    def __init__(self, *listeners: Listener) -> None:
        self._listeners = listeners

    def __call__(self, point: str, step: int = 0, micro_batch: int = 0) -> None:
        """This rank has come to a point; arguments as a listener's."""
        for listener in self._listeners:
            listener(point, step, micro_batch)


NO_LISTENERS = Events()
