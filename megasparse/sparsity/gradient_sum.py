"""Where the gradient of a weight is added up over the micro-batches of an optimizer step.

autograd adds a 16-bit gradient to a float32 one in two passes, and knows neither that a product is
still to be multiplied by the scales of its operands nor that a step has just begun. Weights whose
GEMMs are ours are added up by one kernel instead (`accumulate_`), in the backward pass of their
layer; autograd is given no gradient for them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megasparse.kernels import accumulate_
from megasparse.kernels.factors import Factors


@dataclass
class StepSums:
    """What the sums of all weights share.

    Attributes:
        open: gradients are added up now; else they are autograd's, as for whoever wants them one
            by one.
        begins: int64 (1,) on the device, 1 in the first micro-batch of a step and 0 in the others:
            sums need not be zeroed. None: they are, before every step.
    """

    open: bool = False
    begins: torch.Tensor | None = None


@dataclass(frozen=True)
class GradientSum:
    """The sum of one weight.

    Args:
        total: `(N, K)`, contiguous, in the dtype in which gradients are added up.
        step: shared by all.
    """

    total: torch.Tensor
    step: StepSums

    def add(self, dw_NK: torch.Tensor, factors: Factors | None = None) -> None:
        """Add a micro-batch's gradient, multiplied by the factors that it still lacks."""
        accumulate_(self.total, dw_NK, factors=factors, begins=self.step.begins)
