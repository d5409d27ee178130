"""Where a run is: step and micro-batch, from which the seeds of random draws follow."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from megasparse.kernels import derive_seed


@dataclass
class Clock:
    """Where the run is; shared by all sparse layers, set by the training loop.

    Attributes:
        seed: the run's seed.
        train_iters: length of the run, for the schedule.
        step: optimizer steps done.
        samples: sequences trained on in them.
        batch: sequences of the step under way.
        micro_batch: number of the micro-batch within the step, over all data-parallel ranks, so
            that a micro-batch draws the same random numbers whichever rank computes it.
        slot: place of the micro-batch among those that are under way on this rank (a pipeline has
            several); its seeds on the device are there.
    """

    seed: int
    train_iters: int
    step: int = 0
    samples: int = 0
    batch: int = 0
    micro_batch: int = 0
    slot: int = 0

    def advance(self) -> None:
        """The step under way is over, trained or skipped."""
        self.step += 1
        self.samples += self.batch

    def mvue_seed(self, layer: int) -> int:
        """Seed of one layer's MVUE draws in the current micro-batch."""
        return derive_seed(self.seed, self.step, self.micro_batch, layer)

    def step_seed(self, layer: int) -> int:
        """Seed of the draws of a layer whose tokens are of several micro-batches, in this step."""
        return derive_seed(self.seed, self.step, layer)

    @contextlib.contextmanager
    def at(self, micro_batch: int, slot: int) -> Iterator[None]:
        """Set back to a micro-batch for a while: a layer is recomputed with the draws it had."""
        before = self.micro_batch, self.slot
        self.micro_batch, self.slot = micro_batch, slot
        try:
            yield
        finally:
            self.micro_batch, self.slot = before


def draw_key(name: str) -> int:
    """What tells a layer's random draws from another's: by name, the same in every layout.

    Args:
        name: of the linear in the whole model.
    """
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
