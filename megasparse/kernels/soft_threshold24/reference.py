"""The definition of the S-STE projection and of its scale's two sums, in plain torch."""

from __future__ import annotations

import torch

_CHUNK = 1 << 18


def soft_threshold24(w: torch.Tensor) -> torch.Tensor:
    """`w`'s shape (..., K) and dtype: sign(a) * max(|a| - t, 0), t the second smallest of 4 |a|."""
    out = torch.empty(w.shape, dtype=w.dtype, device=w.device)
    groups, projected = w.reshape(-1, 4), out.view(-1, 4)
    for start in range(0, groups.shape[0], _CHUNK):
        group = groups[start : start + _CHUNK].float()
        projected[start : start + _CHUNK] = _project(group).to(w.dtype)
    return out


def scale_sums(w: torch.Tensor) -> torch.Tensor:
    """float64 (2,): <W, S> and <S, S> with S = soft_threshold24(W) as rounded to `w`'s dtype."""
    sums = torch.zeros(2, dtype=torch.float64, device=w.device)
    groups = w.reshape(-1, 4)
    for start in range(0, groups.shape[0], _CHUNK):
        chunk = groups[start : start + _CHUNK]
        projected = _project(chunk.float()).to(w.dtype).double()
        sums[0] += (chunk.double() * projected).sum()
        sums[1] += (projected * projected).sum()
    return sums


def _project(group: torch.Tensor) -> torch.Tensor:
    magnitude = group.abs()
    a, b, c, d = magnitude.unbind(1)
    low_ab, high_ab = torch.minimum(a, b), torch.maximum(a, b)
    low_cd, high_cd = torch.minimum(c, d), torch.maximum(c, d)
    threshold = torch.minimum(torch.maximum(low_ab, low_cd), torch.minimum(high_ab, high_cd))
    threshold = threshold.unsqueeze(1)
    # Not max(|a| - t, 0): that is NaN where both are infinite, and gives -0.0 for negative ones.
    shrunk = torch.copysign(magnitude - threshold, group)
    return torch.where(magnitude > threshold, shrunk, torch.zeros_like(shrunk))
