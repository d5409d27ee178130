"""What the GEMMs of one weight tell about a step, when they are asked: sums left on the device.

The recorder asks at log steps alone. Figures are kept as sums and maxima, so that ranks and
micro-batches can be added up; nothing here waits for the device.
"""

from __future__ import annotations

import torch

from megasparse.kernels import mvue24_variance
from megasparse.sparsity.recipe import SparsityRecipe
from megasparse.timer import StepTimer

# Sums: squared norms of dZ before and after MVUE and the variance of the latter; squared norms of
# the masked decay and of the gradient; per FP8 operand the entries that were rounded to the largest
# value of the format, those that were not zero and became it, and all of them. Maxima: the largest
# magnitude of each FP8 operand before it is scaled.
NOTHING = -1.0  # in maxima, which are all positive
OPERANDS = ("x", "weight", "grad_output", "grad_output_mvue")


class Probe:
    """The figures of one weight in one step.

    Args:
        timer: of the run; operand preparation is a phase of the step.

    Attributes:
        asked: whether to measure; off by default.
        waits: asked, and no operands of the weight were made since.
        sums: float64 0-d tensors by name.
        maxima: float32 0-d tensors by name.
    """

    def __init__(self, timer: StepTimer | None = None) -> None:
        self.timer = timer or StepTimer()
        self.asked = self.waits = False
        self.sums: dict[str, torch.Tensor] = {}
        self.maxima: dict[str, torch.Tensor] = {}

    def ask(self) -> None:
        """Measure until `asked` is taken back; what was measured before is forgotten.

        The tensors stay where they are: a captured step adds to them.
        """
        self.asked = self.waits = True
        if self.sums:
            torch._foreach_zero_(list(self.sums.values()))
        for largest in self.maxima.values():
            largest.fill_(NOTHING)

    def dismiss(self) -> None:
        """Measure no longer; what was measured stays."""
        self.asked = self.waits = False

    def mvue(self, before: torch.Tensor, after: torch.Tensor, recipe: SparsityRecipe) -> None:
        """A draw.

        Args:
            before: dZ, with the zeros that fill it up.
            after: MVUE(dZ), or its non-zeros alone.
            recipe: how it was drawn.
        """
        if self.asked:
            exact, strided = recipe.mvue == "exact", recipe.strided_groups
            variance = mvue24_variance(before, dim=0, exact=exact, strided=strided)
            self._add("mvue_before", _square(before))
            self._add("mvue_after", _square(after))
            self._add("mvue_variance", variance)

    def decay(
        self, gradient: torch.Tensor, masked: torch.Tensor, strength: float | torch.Tensor
    ) -> None:
        """A piece of the weight before its update.

        Args:
            gradient: clipped, without the decay.
            masked: (1 - M) o W.
            strength: lambda.
        """
        if self.asked:
            self._add("gradient", _square(gradient))
            self._add("decay", _square(masked) * strength**2)

    def fp8(
        self, operand: str, values: torch.Tensor, rounded: torch.Tensor, dtype: torch.dtype
    ) -> None:
        """A rounding to FP8.

        Args:
            operand: one of OPERANDS.
            values: before.
            rounded: scaled, in the values of the format, any dtype.
            dtype: the format.
        """
        if not self.asked:
            return
        limit = torch.finfo(dtype).max
        self._add(f"fp8_{operand}_largest", torch.count_nonzero(rounded.abs() >= limit))
        lost = torch.count_nonzero(values) - torch.count_nonzero(rounded)
        self._add(f"fp8_{operand}_lost", lost)
        self._add(f"fp8_{operand}_all", torch.full_like(lost, values.numel()))
        amax = values.detach().abs().amax().float()
        known = self.maxima.get(operand)
        if known is None:
            self.maxima[operand] = amax
        else:
            known.copy_(torch.maximum(known, amax))

    def _add(self, name: str, value: torch.Tensor) -> None:
        known = self.sums.get(name)
        if known is None:
            self.sums[name] = value.double().clone()
        else:
            known.add_(value)


def _square(tensor: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(tensor, dtype=torch.float32).double().square()
