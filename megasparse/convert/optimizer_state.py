"""Adam's state beside a model that is converted: its moments, and how many steps it has made."""

from __future__ import annotations

from typing import Protocol

import torch

MOMENTS = ("exp_avg", "exp_avg_sq")


class OptimizerState(Protocol):
    """The state of an Adam whose masters are the float32 weights that a `Source` gives.

    Attributes:
        steps: that the optimizer has made, at least 1; Adam's bias correction counts them.
    """

    steps: int

    def read(self, name: str, kind: str) -> torch.Tensor:
        """A moment of a parameter, whole, float32, on the CPU; the vocabulary without padding.

        Args:
            kind: one of `MOMENTS`.

        Raises:
            CheckpointError: damaged, or with a NaN or an infinity; names file and tensor.
        """
        ...
