"""The definition of `mvue_pack24`: the operations that it fuses, one after the other."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from megasparse.kernels.mvue24.places import Places
from megasparse.kernels.mvue24.reference import mvue24
from megasparse.kernels.pack24.reference import pack24
from megasparse.kernels.packed24 import COLUMN_MULTIPLE, Packed24, unit_scale
from megasparse.kernels.random import SeedLike
from megasparse.kernels.token_order import by_groups


def mvue_pack24(
    dz: torch.Tensor,
    seed: SeedLike,
    channels: tuple[tuple[int, int, int], ...],
    tokens: Places,
    exact: bool,
    strided: bool = False,
) -> tuple[Packed24, torch.Tensor]:
    """MVUE(dZ)^T packed; 0-d bool, whether a group of it has more than two non-zeros."""
    missing = -dz.shape[0] % COLUMN_MULTIPLE[dz.dtype]
    padded = pad(dz, (0, 0, 0, missing))
    pruned = mvue24_of_sections(padded, seed, channels, tokens, exact, strided)
    if strided:
        pruned = by_groups(pruned)
    return pack24(pruned.t(), dz.dtype, unit_scale(dz.device))


def mvue24_of_sections(
    dz: torch.Tensor,
    seed: SeedLike,
    channels: tuple[tuple[int, int, int], ...],
    tokens: Places,
    exact: bool,
    strided: bool,
) -> torch.Tensor:
    """MVUE(dZ) (T, N), 2:4 along tokens; each section draws the numbers of its place."""
    ends = [start for start, _ in tokens[1:]] + [dz.shape[0]]
    runs = [
        torch.cat(
            [
                mvue24(dz[first:end, start : start + n], seed, 0, (token, place), exact, strided)
                for start, place, n in channels
            ],
            1,
        )
        for (first, token), end in zip(tokens, ends, strict=True)
        if first < end
    ]
    return torch.cat(runs)
