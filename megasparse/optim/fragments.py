"""Which part of which parameter an optimizer's tensor holds.

Without ZeRO the optimizer steps on the parameters themselves. With ZeRO it steps on flat float32
shards, each of which holds pieces of several parameters. A `Fragment` names one such piece, so that
what is defined per weight (masks, checkpoints) finds its place in both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Fragment:
    """`length` consecutive entries, in the optimizer's tensor and in the flattened parameter.

    Attributes:
        name: of the parameter in the model.
        parameter: the model's parameter, of any dtype.
        tensor: the optimizer's tensor, float32.
        tensor_start: first entry in `tensor`, flattened.
        start: first entry in the flattened local parameter.
    """

    name: str
    parameter: torch.nn.Parameter
    tensor: torch.Tensor
    tensor_start: int
    start: int
    length: int

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """This piece of anything shaped like `tensor` (its gradient, a moment), a 1-D view."""
        return flat.view(-1).narrow(0, self.tensor_start, self.length)

    def of_parameter(self, like: torch.Tensor) -> torch.Tensor:
        """This piece of anything shaped like the parameter (its mask), a 1-D view."""
        return like.reshape(-1).narrow(0, self.start, self.length)
