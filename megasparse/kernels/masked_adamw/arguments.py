"""The numbers of an update of AdamW with a masked decay."""

from __future__ import annotations

from typing import NamedTuple


class AdamW(NamedTuple):
    """The numbers of an update.

    Attributes:
        step: of the update, from 1.
        lr, beta1, beta2, eps, weight_decay: as AdamW's.
        clip: that the gradient is multiplied by first.
        decay: lambda of the masked decay.
        decoupled: the decay joins the momentum (AST), not the gradient (FST, SR-STE).
    """

    step: int
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    clip: float = 1.0
    decay: float = 0.0
    decoupled: bool = False
