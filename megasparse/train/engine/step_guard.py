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
        self._mean = torch.zeros((), device=grid.device)
        self._loss = 0.0
        self._sent: tuple[torch.Tensor, torch.cuda.Event | None] | None = None
        for part in poison.poisoned_gradients() if poison is not None else ():
            for name, parameter in model.named_parameters():
                if part in name:
                    parameter.register_hook(lambda g, point=f"grad/{part}": self._scaled(g, point))

    def begin(self) -> None:
        """Remember what a step changes before its update."""
        self._kept.clear()
        self._loss_is_finite, self._sent = True, None
        self._rng = rng_state(self._grid)
        self._sparsity = self._controller.snapshot()

    def keep(self, batch: Batch, number: int) -> Batch:
        """Remember a micro-batch."""
        self._kept.append(MicroBatch(batch, number))
        return batch

    def poisoned(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss, times NaN or infinity if it is to be poisoned."""
        return self._scaled(loss, "loss")

    def check_loss(self, loss: torch.Tensor) -> None:
        """Before the update: whether the loss is finite on all ranks; a collective call.

        The answer is waited for when it is asked for (`loss_is_finite`, `loss`, `read`).

        Args:
            loss: 0-d, of the step, on this rank's data.
        """
        self._bad = (~torch.isfinite(loss)).float()
        if self._grid.world > 1:
            dist.all_reduce(self._bad, op=dist.ReduceOp.MAX)
        self._mean = self._grid.mean_over_dp_cp(loss.clone())
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

    @property
    def loss(self) -> float:
        """Mean over data and context parallel ranks of the loss that was checked."""
        if self._loss_is_finite is None:
            self.read()
        return self._loss

    def may_update(self, norm: torch.Tensor) -> torch.Tensor:
        """0-d bool on the device: whether loss and gradient norm of the step are finite."""
        refused = self._loss_is_finite is False
        return torch.isfinite(norm) & (self._bad == 0) & (not refused)

    def read(self, *values: torch.Tensor) -> list[float]:
        """0-d tensors on the host, in one transfer with what is to be known of the loss."""
        self.send(*values)
        return self.receive()

    def send(self, *values: torch.Tensor) -> None:
        """Begin the transfer of 0-d tensors, and of what is to be known of the loss.

        The device goes on meanwhile with what is launched behind it.
        """
        known = torch.stack([self._bad, self._mean.float(), *(v.float() for v in values)])
        if not known.is_cuda:
            self._sent = known, None
            return
        on_host = torch.empty(known.shape, pin_memory=True)
        on_host.copy_(known, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._sent = on_host, arrived

    def receive(self) -> list[float]:
        """The values that were sent; waits for them, not for what was launched since."""
        assert self._sent is not None
        (on_host, arrived), self._sent = self._sent, None
        if arrived is not None:
            arrived.synchronize()
        bad, loss, *values = on_host.tolist()
        if self._loss_is_finite is None:
            self._loss_is_finite, self._loss = not bad, loss
        return values

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
