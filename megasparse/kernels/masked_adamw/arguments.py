"""The numbers of an update of AdamW with a masked decay."""

from __future__ import annotations

import math
from typing import NamedTuple

# Places in `AdamW.derived`.
CLIP, DECAY, APPLIES = 0, 1, 9


class AdamW(NamedTuple):
    """The numbers of an update.

    Attributes:
        step: of the update, from 1.
        lr, beta1, beta2, eps, weight_decay: as AdamW's.
        clip: that the gradient is multiplied by first.
        decay: lambda of the masked decay.
        decoupled: the decay joins the momentum (AST, CAST), not the gradient (FST, SR-STE).
        of_sign: it is of sign(w) instead of w (CAST); decoupled.
        kept: what of the momentum stays at masked entries beside a decay `of_sign`.
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
    of_sign: bool = False
    kept: float = 1.0

    def derived(self) -> list[float]:
        """What a kernel computes with: clip, decay, 1 - beta1, beta2, 1 - beta2, eps, 1 - lr wd,
        lr over the first moment's bias correction, the root of the second's, 1: the update is made
        (0: everything stays as it is), and what is kept of the momentum."""
        return [
            self.clip,
            self.decay,
            1 - self.beta1,
            self.beta2,
            1 - self.beta2,
            self.eps,
            1 - self.lr * self.weight_decay,
            self.lr / (1 - self.beta1**self.step),
            math.sqrt(1 - self.beta2**self.step),
            1.0,
            self.kept,
        ]
