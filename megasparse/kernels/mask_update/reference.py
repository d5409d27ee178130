"""The definition of what is kept of a mask that is replaced, in plain torch."""

from __future__ import annotations

import torch

from megasparse.kernels.patterns import pack_fours


def replaced(mask: torch.Tensor, new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The old mask a bit an entry, uint8 (N, K/4), and in how many entries `new` differs."""
    return pack_fours(mask), torch.count_nonzero(mask ^ new)
