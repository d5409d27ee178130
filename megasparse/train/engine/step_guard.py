"""A NaN or an infinity in a step: nothing changes, and the culprit is named.

In a good step this costs one small reduction. Once loss or gradient norm are not finite, the step
is computed again, micro-batch by micro-batch, without an update: what is found again is named by
rank, tensor, micro-batch and samples; what is not was transient (bad hardware, not bad numbers).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

from megasparse.errors import NumericsError
from megasparse.megatron.grid import Grid, rng_state, set_rng_state
from megasparse.sparsity.controller import SparsityController

Batch = dict[str, torch.Tensor]


class NonFiniteStep(NumericsError):
    """A step with a NaN or an infinity; everything is as before it.

    Attributes:
        lr: learning rate that it had.
    """

    def __init__(self, message: str, lr: float = 0.0) -> None:
        super().__init__(message)
        self.lr = lr


@dataclass
class MicroBatch:
    """A micro-batch of the current step, and its number over all data-parallel ranks."""

    batch: Batch
    number: int


class Poison(Protocol):
    """Values to be made NaN or infinite, so that tests can see what becomes of a bad step."""

    def poison(self, point: str, step: int) -> float | None:
        """What the value at a point (`loss`, `grad/PART`) is to be multiplied by, if anything."""

    def poisoned_gradients(self) -> list[str]:
        """Parts of the names of parameters whose gradient is to be poisoned at some step."""


class StepGuard:
    """Checks one step after the other.

    Args:
        grid: this rank's place.
        model: its parameters get the gradients that `poison` names.
        controller: its states are put back with the step.
        poison: None: no value is poisoned.
    """

    def __init__(
        self,
        grid: Grid,
        model: torch.nn.Module,
        controller: SparsityController,
        poison: Poison | None = None,
    ) -> None:
        self._grid, self._controller, self.poison = grid, controller, poison
        self._kept: list[MicroBatch] = []
        self._rng: dict[str, torch.Tensor] = {}
        self._sparsity: list[Any] = []
        self._loss_is_finite: bool | None = True  # None: the device knows
        self._bad = torch.zeros((), device=grid.device)
        for part in poison.poisoned_gradients() if poison is not None else ():
            for name, parameter in model.named_parameters():
                if part in name:
                    parameter.register_hook(lambda g, point=f"grad/{part}": self._scaled(g, point))

    def begin(self) -> None:
        """Remember what a step changes before its update."""
        self._kept.clear()
        self._loss_is_finite = True
        self._rng = rng_state(self._grid)
        self._sparsity = self._controller.snapshot()

    def keep(self, batch: Batch, number: int) -> Batch:
        """Remember a micro-batch."""
        self._kept.append(MicroBatch(batch, number))
        return batch

    def poisoned(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss, times NaN or infinity if it is to be poisoned."""
        return self._scaled(loss, "loss")

    def check_loss(self, total: torch.Tensor) -> None:
        """Before the update: whether the loss is finite on all ranks; a collective call.

        The answer is waited for when it is asked for (`loss_is_finite`, `read`).
        """
        self._bad = (~torch.isfinite(total)).float()
        if self._grid.world > 1:
            dist.all_reduce(self._bad, op=dist.ReduceOp.MAX)
        self._loss_is_finite = None

    def refuse_update(self) -> None:
        """Take the loss of this step for one that is not finite."""
        self._loss_is_finite = False

    @property
    def loss_is_finite(self) -> bool:
        """Whether the loss that was checked is finite on all ranks."""
        if self._loss_is_finite is None:
            self.read()
        return bool(self._loss_is_finite)

    def read(self, *values: torch.Tensor) -> list[float]:
        """0-d tensors on the host, in one transfer with what is to be known of the loss."""
        if self._loss_is_finite is not None:
            return torch.stack([v.float() for v in values]).tolist() if values else []
        bad, *rest = torch.stack([self._bad, *(v.float() for v in values)]).tolist()
        self._loss_is_finite = not bad
        return rest

    def end(
        self, lr: float, norm: float, compute_again: Callable[[list[MicroBatch]], list[str]]
    ) -> None:
        """Accept the step, or put everything back and say why; the same on all ranks.

        Args:
            lr: learning rate of the step.
            norm: of its gradient.
            compute_again: computes the step once more, from the state before it; gives what is
                wrong on this rank.

        Raises:
            NonFiniteStep: names rank, tensor, micro-batch and samples.
        """
        if self.loss_is_finite and math.isfinite(norm):
            return
        step = self._controller.clock.step + 1
        what = f"gradient norm {norm}" if self.loss_is_finite else "a loss that is not finite"
        self._put_back()
        findings = compute_again(self._kept)
        self._put_back()
        if self._grid.world > 1:
            everyone: list[Any] = [None] * self._grid.world
            dist.all_gather_object(everyone, findings)
            findings = [finding for one in everyone for finding in one]
        # A loss that is not finite is the cause of such gradients, also on other pipeline stages.
        findings.sort(key=lambda finding: not finding.startswith("the loss"))
        cause = findings[0] if findings else "computed again it was finite: a transient fault"
        more = f" (and {len(findings) - 1} more)" if len(findings) > 1 else ""
        raise NonFiniteStep(f"step {step}: {what}; {cause}{more}; no update was made", lr)

    def _put_back(self) -> None:
        set_rng_state(self._grid, self._rng)
        self._controller.restore(self._sparsity)

    def _scaled(self, value: torch.Tensor, point: str) -> torch.Tensor:
        if self.poison is None:
            return value
        factor = self.poison.poison(point, self._controller.clock.step)
        return value if factor is None else value * factor


def samples_of(batch: Batch) -> str:
    """The samples of a micro-batch as source:sample."""
    if "sample_id" not in batch:
        return "samples unknown"
    return "samples " + ", ".join(f"{s}:{i}" for s, i in batch["sample_id"].tolist())
