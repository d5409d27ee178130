"""What the GEMMs of one weight tell about a step, when they are asked: sums left on the device.

The recorder asks at log steps alone. Figures are kept as sums and maxima, so that ranks and
micro-batches can be added up; nothing here waits for the device. A log step is to be hardly slower
than others: kernels read each tensor once, and add to the figures themselves.
"""

from __future__ import annotations

import torch

from megasparse.kernels import add_rounding_figures_, add_square_, mvue24_squares
from megasparse.sparsity.recipe import SparsityRecipe
from megasparse.timer import StepTimer

NOTHING = -1.0  # in maxima, which are all positive
OPERANDS = ("x", "weight", "grad_output", "grad_output_mvue")
# Squared norms of dZ, the variance of its draw, squared norm of the draw; squared norms of the
# masked decay and of the gradient; per FP8 operand the entries that were rounded to the largest
# value of the format, those that were not zero and became it, and all of them. Kernels fill
# neighbours at once. Maxima are the largest magnitudes of operands before they are scaled.
STEP_SUMS = (
    "mvue_before", "mvue_variance", "mvue_after", "decay", "gradient",
    *(f"fp8_{operand}_{kind}" for operand in OPERANDS for kind in ("largest", "lost", "all")),
)  # fmt: skip
_PLACES = {name: place for place, name in enumerate(STEP_SUMS)}


class Probe:
    """The figures of one weight in one step.

    Args:
        timer: of the run; operand preparation is a phase of the step.

    Attributes:
        asked: whether to measure; off by default.
        waits: asked, and no operands of the weight were made since.
        sums: what was told, float64 0-d tensors by name: views of `totals`.
        maxima: likewise, float32, by operand: views of `largest`.
        totals: float64 (STEP_SUMS,); None: nothing was ever told.
        largest: float32 (OPERANDS,); None: likewise.
    """

    def __init__(self, timer: StepTimer | None = None) -> None:
        self.timer = timer or StepTimer()
        self.asked = self.waits = False
        self.sums: dict[str, torch.Tensor] = {}
        self.maxima: dict[str, torch.Tensor] = {}
        self.totals: torch.Tensor | None = None
        self.largest: torch.Tensor | None = None

    def ask(self) -> None:
        """Measure until `asked` is taken back; what was measured before is forgotten.

        The tensors stay where they are: a captured step adds to them.
        """
        self.asked = self.waits = True
        if self.totals is not None and self.largest is not None:
            self.totals.zero_()
            self.largest.fill_(NOTHING)

    def dismiss(self) -> None:
        """Measure no longer; what was measured stays."""
        self.asked = self.waits = False

    def mvue(
        self,
        before: torch.Tensor,
        after: torch.Tensor,
        recipe: SparsityRecipe,
        scale_inv: torch.Tensor | None = None,
    ) -> None:
        """A draw.

        Args:
            before: dZ, with the zeros that fill it up.
            after: MVUE(dZ), or its non-zeros alone, in 32, 16 or 8 bits.
            recipe: how it was drawn.
            scale_inv: float32 0-d, what undoes the scaling of `after`; None: it has none.
        """
        if self.asked:
            exact, strided = recipe.mvue == "exact", recipe.strided_groups
            squares = mvue24_squares(before, dim=0, exact=exact, strided=strided)
            self._sums(before.device, "mvue_before", "mvue_variance").add_(squares)
            total = self._sum(after.device, "mvue_after")
            add_square_(total, after, factor=1.0 if scale_inv is None else scale_inv)

    def decay(
        self, gradient: torch.Tensor, masked: torch.Tensor, strength: float | torch.Tensor
    ) -> None:
        """A piece of the weight before its update.

        Args:
            gradient: clipped, without the decay.
            masked: (1 - M) o W.
            strength: lambda; or a float64 0-d tensor.
        """
        if self.asked:
            add_square_(self._sum(gradient.device, "gradient"), gradient)
            add_square_(self._sum(masked.device, "decay"), masked, factor=strength)

    def fp8(self, operand: str, values: torch.Tensor, rounded: torch.Tensor) -> None:
        """A rounding to FP8.

        Args:
            operand: one of OPERANDS.
            values: before.
            rounded: scaled, in 8 bits; with zeros that fill it up, or its non-zeros alone.
        """
        if self.asked and values.numel():  # experts may have no tokens
            kinds = (f"fp8_{operand}_{kind}" for kind in ("largest", "lost", "all"))
            sums = self._sums(values.device, *kinds)
            assert self.largest is not None
            if operand not in self.maxima:
                self.maxima[operand] = self.largest[OPERANDS.index(operand)]
            add_rounding_figures_(sums, self.maxima[operand], values.detach(), rounded)

    def _sum(self, device: torch.device, name: str) -> torch.Tensor:
        """0-d, of one name."""
        return self._sums(device, name)[0]

    def _sums(self, device: torch.device, *names: str) -> torch.Tensor:
        """The sums of names that follow each other in STEP_SUMS."""
        if self.totals is None:
            self.totals = torch.zeros(len(STEP_SUMS), dtype=torch.float64, device=device)
            self.largest = torch.full((len(OPERANDS),), NOTHING, device=device)
        for name in names:
            self.sums.setdefault(name, self.totals[_PLACES[name]])
        return self.totals.narrow(0, _PLACES[names[0]], len(names))
