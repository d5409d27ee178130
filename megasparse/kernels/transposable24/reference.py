"""The definition of the transposable 2:4 mask, in plain torch."""

from __future__ import annotations

import torch

from megasparse.kernels.patterns import PAIRS, expand_patterns, transposable_rows

_CPU_CHUNK = 1 << 13  # blocks at a time: the working set stays in the cache
_CUDA_CHUNK = 1 << 21


def transposable24(w: torch.Tensor) -> torch.Tensor:
    """Bool mask (N, K) of `w` (N, K): in each 4x4 block the first best of the 90 patterns."""
    rows, cols = w.shape
    blocks = w.reshape(rows // 4, 4, cols // 4, 4)
    indices = torch.empty((rows // 4, cols // 4), dtype=torch.uint8, device=w.device)
    step = max(1, (_CUDA_CHUNK if w.is_cuda else _CPU_CHUNK) // max(cols // 4, 1))
    for start in range(0, rows // 4, step):
        chunk = blocks[start : start + step].float().abs().permute(1, 3, 0, 2).contiguous()
        indices[start : start + step] = first_best_pattern(chunk)
    return expand_patterns(indices, transposable=True)


def first_best_pattern(magnitudes: torch.Tensor) -> torch.Tensor:
    """The winning pattern of each block: fp32 (4, 4, ...) -> uint8 (...).

    The score of a pattern that keeps the column pairs p, q, r, s in rows 0 to 3 is, every addition
    rounded to fp32: `(row0[p] + row1[q]) + (row2[r] + row3[s])`, where `row[p]` is the sum of the
    pair's two magnitudes, lower column first. The first pattern with the highest score wins; an
    infinite score ties with any other infinite score.
    """
    pair_sums = [[row[first] + row[second] for first, second in PAIRS] for row in magnitudes]
    top = [[a + b for b in pair_sums[1]] for a in pair_sums[0]]
    bottom = [[a + b for b in pair_sums[3]] for a in pair_sums[2]]
    best = torch.full_like(magnitudes[0, 0], -1.0)
    winner = torch.zeros_like(best, dtype=torch.uint8)
    score, better = torch.empty_like(best), torch.empty_like(best, dtype=torch.bool)
    for index, (p, q, r, s) in enumerate(transposable_rows()):
        torch.add(top[p][q], bottom[r][s], out=score)
        torch.gt(score, best, out=better)
        torch.maximum(best, score, out=best)
        winner.masked_fill_(better, index)
    return winner
