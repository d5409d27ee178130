"""The lambda of one weight, where each has its own (`optim/decay_rule.py` finds it)."""

from __future__ import annotations

import torch


class OwnDecay:
    """lambda at an address that stays, so that captured updates find it.

    Args:
        device: of the weight.

    Attributes:
        value: float32 0-d; 0 before the first refresh.
        step: of the latest refresh, -1 before the first.
    """

    def __init__(self, device: torch.device) -> None:
        self.value = torch.zeros((), dtype=torch.float32, device=device)
        self.step = -1

    def export_state(self) -> dict[str, torch.Tensor]:
        """For a checkpoint."""
        return {
            "decay": self.value.detach().clone(),
            "decay_step": torch.tensor(self.step, dtype=torch.int64),
        }

    def import_state(self, state: dict[str, torch.Tensor]) -> None:
        """Take over what `export_state` gave; of a run without it nothing."""
        if "decay" in state:
            self.value.copy_(state["decay"])
            self.step = int(state["decay_step"])
