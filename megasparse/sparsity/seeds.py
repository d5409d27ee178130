"""Seeds of MVUE draws on the device, for passes that are captured once and replayed.

A draw is a function of (run seed, step, micro-batch, layer, place). Eager passes take the seed from
the host; a captured one reads it at a fixed address, where each micro-batch's seeds are put before
it. The numbers are those of `Clock.mvue_seed`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megasparse.kernels.random import derive_seeds
from megasparse.sparsity.clock import Clock


class DeviceSeeds:
    """The seeds of all layers of a rank for the micro-batches that are under way.

    Args:
        clock: of the run.
        layers: what tells each layer's draws from another's.
        device: where the passes run.
        slots: micro-batches that are under way at a time.
    """

    def __init__(
        self, clock: Clock, layers: Sequence[int], device: torch.device, slots: int = 1
    ) -> None:
        self._clock = clock
        self._layers = np.array(layers, dtype=np.uint64)
        self._table = torch.zeros(slots, len(layers), dtype=torch.int64, device=device)
        self._step = self._table  # (micro-batches, layers), of the step

    def begin_step(self, micro_batches: Sequence[int]) -> None:
        """Send the seeds of a step to the device, without waiting for it.

        Args:
            micro_batches: their numbers over all data-parallel ranks, in this rank's order.
        """
        seeds = derive_seeds(
            (self._clock.seed, self._clock.step), np.array(micro_batches), self._layers
        )
        on_host = torch.from_numpy(seeds)
        if self._table.is_cuda:
            on_host = on_host.pin_memory()
        self._step = on_host.to(self._table.device, non_blocking=True)

    def begin_micro_batch(self, number: int, slot: int = 0) -> None:
        """Put the seeds of this rank's `number`-th micro-batch of the step into a slot."""
        self._table[slot].copy_(self._step[number])

    def of(self, layer: int, slot: int = 0) -> torch.Tensor:
        """int64 (1,) at an address that stays.

        Args:
            layer: place in `layers`.
        """
        return self._table[slot, layer : layer + 1]
