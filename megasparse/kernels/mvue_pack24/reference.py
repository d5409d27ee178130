"""The definition of `mvue_pack24`: the two operations one after the other."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from megasparse.kernels.mvue24 import mvue24
from megasparse.kernels.pack24 import pack24
from megasparse.kernels.packed24 import COLUMN_MULTIPLE, Packed24
from megasparse.kernels.random import SeedLike


def mvue_pack24(
    dz: torch.Tensor,
    seed: SeedLike,
    channels: tuple[tuple[int, int, int], ...],
    exact: bool,
    error_flag: torch.Tensor | None,
) -> Packed24:
    """See `megasparse.kernels.mvue_pack24`."""
    pruned = [
        mvue24(
            dz.narrow(1, start, length), seed=seed, dim=0, offsets=(0, place), exact=exact,
            backend="reference",
        )
        for start, place, length in channels
    ]  # fmt: skip
    transposed = torch.cat(pruned, 1).t().contiguous()
    missing = -dz.shape[0] % COLUMN_MULTIPLE[dz.dtype]
    return pack24(pad(transposed, (0, missing)), error_flag=error_flag, backend="reference")
