"""The definition of row-wise 2:4 magnitude pruning, in plain torch."""

from __future__ import annotations

import torch

_CHUNK = 1 << 18


def prune24(w: torch.Tensor) -> torch.Tensor:
    """Bool mask of `w`'s shape (..., K): of each 4 along K the two that beat at least two others.

    `x` beats an earlier `y` when |x| >= |y| and a later one when |x| > |y|, so of equals the later
    index stays and exactly two are kept. Works in chunks: a few megabytes beside the result.
    """
    mask = torch.empty(w.shape, dtype=torch.bool, device=w.device)
    groups, kept = w.reshape(-1, 4), mask.view(-1, 4)
    for start in range(0, groups.shape[0], _CHUNK):
        a, b, c, d = groups[start : start + _CHUNK].float().abs().t().contiguous()
        ab, ac, ad, bc, bd, cd = a > b, a > c, a > d, b > c, b > d, c > d
        ba, ca, da, cb, db, dc = ~ab, ~ac, ~ad, ~bc, ~bd, ~cd
        wins = ((ab, ac, ad), (ba, bc, bd), (ca, cb, cd), (da, db, dc))
        for column, (x, y, z) in enumerate(wins):
            kept[start : start + _CHUNK, column] = (x & y) | (z & (x | y))
    return mask


def is_24(w: torch.Tensor) -> bool:
    """Whether no 4 along the last dimension have more than two non-zeros (a NaN counts as one)."""
    groups = w.reshape(-1, 4)
    return all(
        int((groups[start : start + _CHUNK].float() != 0).sum(1).max()) <= 2
        for start in range(0, groups.shape[0], _CHUNK)
    )
