"""The FP8 operands of one dense weight: made anew for every optimizer step, at one place in memory.

The counterpart of `SparseWeight` for linears that no recipe prunes. It has no mask and no phase; of
a step it keeps the scaling of its operands alone, which checkpoints save.
"""

from __future__ import annotations

from typing import Any

import torch

from megasparse.sparsity.gemms.dense_fp8 import DenseFp8Gemms, OperandQuantizers
from megasparse.sparsity.gemms.fp8_experts import DenseFp8ExpertGemms
from megasparse.sparsity.gradient_sum import GradientSum
from megasparse.sparsity.probe import Probe


class DenseFp8Weight:
    """A weight `(N, K)` whose three GEMMs are dense and in FP8.

    Args:
        name: the weight's name in the whole model.
        quantizers: of the layer's operands.
        hybrid: output gradients in e5m2.
        experts: whose weights are stacked here; None: no experts'.
        grouped: on a GPU one launch for all experts.

    Attributes:
        moves: times that operands or scales may have got other addresses.
        probe: is told what is quantized.
        total: where gradients of the weight are added up, from the next step on; None: by autograd.
    """

    def __init__(
        self,
        name: str,
        quantizers: OperandQuantizers,
        hybrid: bool = False,
        experts: int | None = None,
        grouped: bool = False,
    ) -> None:
        self.name, self.quantizers, self.experts = name, quantizers, experts
        self.moves = 0
        self.total: GradientSum | None = None
        self.probe = Probe()
        self._gemms: Any = (
            DenseFp8Gemms(quantizers, hybrid, self.probe)
            if experts is None
            else DenseFp8ExpertGemms(experts, quantizers, hybrid, grouped, self.probe)
        )
        self._ready = -1  # step that the operands are of

    def gemms(self, weight: torch.Tensor, step: int) -> Any:
        """The GEMMs of `step`, with operands made at its first use.

        Args:
            weight: the local master weight `(N, K)`.
            step: optimizer steps done so far.

        Returns:
            `LinearGemms`, or `ExpertGemms` of experts.
        """
        if self._ready != step or self.probe.waits:
            self.begin_step(step)
            self.refill(weight)
        return self._gemms

    @property
    def ready_for(self) -> int:
        """Step that the operands are of; -1: of none."""
        return self._ready

    def begin_step(self, step: int) -> None:
        """Note that the operands are of `step`, which `refill` makes them of."""
        self._ready = step
        self._gemms.total = self.total

    def refill(self, weight: torch.Tensor) -> None:
        """Make the operands of the step that has begun; the part that can be captured."""
        self.probe.waits = False
        self._gemms.refill(weight.detach(), None)

    def restore(self) -> None:
        """After a skipped step: what was made and measured in it is of no step."""
        if self.probe.asked:
            self.probe.ask()
        self.invalidate()

    def invalidate(self) -> None:
        """Forget the operands: the master weight was changed from outside."""
        self._ready = -1

    def export_state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps: delayed scales and their history."""
        return self.quantizers.export_state()

    def import_state(self, state: dict[str, torch.Tensor]) -> None:
        """Take over what `export_state` gave; operands are made at the next use."""
        self.quantizers.import_state(state)
        self.moves += 1
        self.invalidate()
