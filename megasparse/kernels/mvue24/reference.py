"""The definition of `mvue24` in plain torch. README.md has the derivation.

All arithmetic is float32 in a fixed order, and nothing in it can be contracted to a fused
multiply-add that would change a result, so that the Triton kernel agrees bit for bit.
"""

from __future__ import annotations

import torch

from megasparse.kernels.random import SeedLike, philox2x32, uniform24

# A group whose magnitudes sum to this or more (or to NaN) is poisoned: sums may overflow.
SUM_LIMIT = 2.0**127

Four = tuple[torch.Tensor, ...]


def mvue24(
    g: torch.Tensor, seed: SeedLike, dim: int, offsets: tuple[int, int], exact: bool
) -> torch.Tensor:
    """See `megasparse.kernels.mvue24`; arguments are checked there, `dim` is 0 or 1."""
    size = g.shape[dim]
    padded = g
    if size % 4:
        shape = list(g.shape)
        shape[dim] = -size % 4
        padded = torch.cat([g, g.new_zeros(shape)], dim)
    out = torch.empty_like(padded)
    entries, results = _every_fourth(padded, dim), _every_fourth(out, dim)
    words = _words(entries[0], seed, dim, offsets)
    x = tuple(entry.float() for entry in entries)
    keep, magnitudes = exact_sample(x, words) if exact else approximate_sample(x, words)
    poisoned = ~(_total(x) < SUM_LIMIT)
    for i in range(4):
        value = torch.copysign(magnitudes[i], x[i]).masked_fill_(~keep[i], 0.0)
        results[i].copy_(value.masked_fill_(poisoned, float("nan") if i < 2 else 0.0))
    return torch.empty_like(g).copy_(out.narrow(dim, 0, size)) if size % 4 else out


def _every_fourth(t: torch.Tensor, dim: int) -> Four:
    return tuple(t[i::4] if dim == 0 else t[:, i::4] for i in range(4))


def _words(entry: torch.Tensor, seed: SeedLike, dim: int, offsets: tuple[int, int]) -> Four:
    """Philox of (group index along `dim`, index along the other dimension)."""
    rows, columns = entry.shape
    first = [offsets[0], offsets[1]]
    first[dim] //= 4
    row = torch.arange(first[0], first[0] + rows, device=entry.device).unsqueeze(1)
    column = torch.arange(first[1], first[1] + columns, device=entry.device).unsqueeze(0)
    return philox2x32(row, column, seed) if dim == 0 else philox2x32(column, row, seed)


def exact_sample(x: Four, words: Four) -> tuple[Four, Four]:
    """Keep-masks and magnitudes of the exact (minimum-variance) sampler: one uniform a group."""
    a = tuple(t.abs() for t in x)
    dominant = tuple(a_i > rest_i for a_i, rest_i in zip(a, _sums_of_others(a)))
    has_dominant = dominant[0] | dominant[1] | dominant[2] | dominant[3]
    c = _cumulative(tuple(a_i.masked_fill(d_i, 0.0) for a_i, d_i in zip(a, dominant)))
    step = torch.where(has_dominant, c[3], c[3] * 0.5)
    t = _threshold(uniform24(words[0]), step)
    first = _first_above(c, t)
    second = _first_above(tuple(c_i - step for c_i in c), t)
    keep = tuple(d | f | s for d, f, s in zip(dominant, first, second))
    return keep, tuple(torch.where(d, a_i, step) for d, a_i in zip(dominant, a))


def approximate_sample(x: Four, words: Four) -> tuple[Four, Four]:
    """Keep-masks and magnitudes of the papers' sampler: two draws without replacement."""
    a = tuple(t.abs() for t in x)
    c = _cumulative(a)
    first = _first_above(c, _threshold(uniform24(words[0]), c[3]))
    remaining = _cumulative(tuple(a_i.masked_fill(f_i, 0.0) for a_i, f_i in zip(a, first)))
    second = _first_above(remaining, _threshold(uniform24(words[1]), remaining[3]))
    odds = tuple(a_i / rest_i for a_i, rest_i in zip(a, _sums_of_others(a)))
    magnitudes = tuple(c[3] / (1.0 + other_odds) for other_odds in _sums_of_others(odds))
    return tuple(f | s for f, s in zip(first, second)), magnitudes


def _total(x: Four) -> torch.Tensor:
    return (x[0].abs() + x[1].abs()) + (x[2].abs() + x[3].abs())


def _sums_of_others(a: Four) -> Four:
    """For each entry the sum of the other three, without cancellation."""
    low, high = a[0] + a[1], a[2] + a[3]
    return a[1] + high, a[0] + high, low + a[3], low + a[2]


def _cumulative(a: Four) -> Four:
    c1 = a[0] + a[1]
    c2 = c1 + a[2]
    return a[0], c1, c2, c2 + a[3]


def _threshold(u: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """u * total, but always below a positive total (rounding of subnormals could reach it)."""
    below = total.view(torch.int32).clamp(min=1).sub_(1).view(torch.float32)
    return torch.minimum(u.mul_(total), below)


def _first_above(c: Four, t: torch.Tensor) -> Four:
    """One-hot: the first of the ascending `c` that is above `t`; none when no one is."""
    above = tuple(c_i > t for c_i in c)
    return above[0], above[1] & ~above[0], above[2] & ~above[1], above[3] & ~above[2]
