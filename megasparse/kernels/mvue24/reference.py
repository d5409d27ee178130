"""The definition of `mvue24` in plain torch. README.md has the derivation.

All arithmetic is float32 in a fixed order, every product and sum rounded by itself, so that the
Triton kernel agrees bit for bit (the approximate sampler's magnitudes: to 1e-6, see there).
"""

from __future__ import annotations

import torch

from megasparse.kernels.random import SeedLike, philox2x32, uniform24

Four = tuple[torch.Tensor, ...]

# The approximate sampler works on magnitudes times SCALE_UP if their sum is below SMALL, else times
# SCALE_DOWN; TINY is the smallest normal number.
SMALL, SCALE_UP, SCALE_DOWN, TINY = 2.0**60, 2.0**64, 2.0**-4, 2.0**-126


def mvue24(
    g: torch.Tensor,
    seed: SeedLike,
    dim: int,
    offsets: tuple[int, int],
    exact: bool,
    strided: bool = False,
    groups: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `megasparse.kernels.mvue24`; arguments are checked there, `dim` is 0 or 1."""
    size = g.shape[dim]
    padded = _in_fours(g, dim)
    out = torch.empty_like(padded)
    entries, results = _members(padded, dim, strided), _members(out, dim, strided)
    words = _words(entries[0], seed, dim, offsets, groups)
    x = tuple(entry.float() for entry in entries)
    sample = exact_magnitudes if exact else approximate_magnitudes
    magnitudes = sample(tuple(t.abs() for t in x), words)
    for result, magnitude, sign in zip(results, magnitudes, x):
        result.copy_(torch.copysign(magnitude, sign))
    return torch.empty_like(g).copy_(out.narrow(dim, 0, size)) if size % 4 else out


def squares(g: torch.Tensor, dim: int, exact: bool, strided: bool) -> torch.Tensor:
    """float64 (2,): the sum of squares of g, and the variance of `mvue24(g)`."""
    square = torch.linalg.vector_norm(g, dtype=torch.float32).double().square()
    return torch.stack([square, expected_square(g, dim, exact, strided) - square])


def expected_square(g: torch.Tensor, dim: int, exact: bool, strided: bool) -> torch.Tensor:
    """0-d float64: the expectation of the sum of squares of `mvue24(g)`.

    Sum over entries of x_i^2 / p_i, which is |x_i| times the magnitude that is kept: `(m + r)^2 /
    2` for a group whose largest `m` is below the sum `r` of the others, else `m^2 + r^2`.
    """
    a = tuple(t.abs().float() for t in _members(_in_fours(g, dim), dim, strided))
    if not exact:
        kept = zip(a, _approximate_kept(a))
        parts = [torch.where(a_i > 0, a_i * kept_i, 0.0) for a_i, kept_i in kept]
        return torch.stack([part.sum(dtype=torch.float64) for part in parts]).sum()
    largest = torch.maximum(torch.maximum(a[0], a[1]), torch.maximum(a[2], a[3]))
    total = a[0] + a[1] + a[2] + a[3]
    rest = total - largest
    square = torch.where(largest < rest, total.square() / 2, largest.square() + rest.square())
    return square.sum(dtype=torch.float64)


def _in_fours(g: torch.Tensor, dim: int) -> torch.Tensor:
    """g with zeros along `dim` up to a multiple of 4."""
    missing = -g.shape[dim] % 4
    if not missing:
        return g
    shape = list(g.shape)
    shape[dim] = missing
    return torch.cat([g, g.new_zeros(shape)], dim)


def _members(t: torch.Tensor, dim: int, strided: bool) -> Four:
    """The first entries of all groups, the second ones, and so on."""
    if strided:
        return t.chunk(4, dim)
    return tuple(t[i::4] if dim == 0 else t[:, i::4] for i in range(4))


def _words(
    entry: torch.Tensor,
    seed: SeedLike,
    dim: int,
    offsets: tuple[int, int],
    groups: torch.Tensor | None,
) -> Four:
    """Philox of (group index along `dim`, index along the other dimension)."""
    first = [offsets[0], offsets[1]]
    first[dim] //= 4
    places = [
        torch.arange(start, start + size, device=entry.device)
        for start, size in zip(first, entry.shape, strict=True)
    ]
    if groups is not None:
        places[dim] = groups
    row, column = places[0].unsqueeze(1), places[1].unsqueeze(0)
    return philox2x32(row, column, seed) if dim == 0 else philox2x32(column, row, seed)


def exact_magnitudes(a: Four, words: Four) -> Four:
    """The minimum-variance sampler on magnitudes `a`: zero where an entry is dropped.

    The intervals of the entries lie in the order (smaller of 0 and 1, smaller of 2 and 3, smaller
    of the two winners, largest), so the largest comes last. With r the sum of the three others and
    step = (r + min(largest, r)) / 2, the numbers t and t + step, t uniform in [0, step), mark the
    kept two. Rounding is monotone, hence, exactly and not just nearly: every entry is at most
    max(largest, step), t falls among the three others, and a largest entry of at least r is always
    kept, as it is.
    """
    smaller01, larger01 = torch.minimum(a[0], a[1]), torch.maximum(a[0], a[1])
    smaller23, larger23 = torch.minimum(a[2], a[3]), torch.maximum(a[2], a[3])
    middle, largest = torch.minimum(larger01, larger23), torch.maximum(larger01, larger23)
    c1 = smaller01 + smaller23
    r = c1 + middle
    step = (r + torch.minimum(largest, r)).mul_(0.5)
    t = _threshold(uniform24(words[0]), step)
    # t is in one of the first three intervals, t + step in one of the last three.
    first0, first1 = smaller01 > t, c1 > t
    second1, second2 = c1 - step > t, r - step > t
    v_smaller01 = step.masked_fill(~first0, 0.0)
    v_smaller23 = step.masked_fill(~((first1 ^ first0) | second1), 0.0)
    v_middle = step.masked_fill(first1 & ~(second2 ^ second1), 0.0)
    v_largest = torch.maximum(largest, step).masked_fill_(second2, 0.0)
    winner01, winner0, winner2 = larger01 >= larger23, a[0] >= a[1], a[2] >= a[3]
    v01 = torch.where(winner01, v_largest, v_middle)
    v23 = torch.where(winner01, v_middle, v_largest)
    return (
        torch.where(winner0, v01, v_smaller01),
        torch.where(winner0, v_smaller01, v01),
        torch.where(winner2, v23, v_smaller23),
        torch.where(winner2, v_smaller23, v23),
    )


def approximate_magnitudes(a: Four, words: Four) -> Four:
    """The papers' sampler on magnitudes `a`: two draws without replacement, |x_i| / p_i.

    p_i = t_i (1 + sum over j != i of a_j / (S - a_j)) with t_i = a_i / S and S the sum, so the kept
    magnitude is S / (1 + sum of the others' odds): no entry of its own in it, nothing cancels, and
    a one-hot group comes back as it was.

    Scaled by SCALE_UP or SCALE_DOWN, no group but one of zeros has a subnormal sum: reciprocals are
    safe on any hardware, and u * sum is below the sum. What is left after the first draw can be
    subnormal only below 2^-180 of the sum: then the odds of the first are infinite and the second
    is zero. TINY is lost in any other sum; it gives a zero group odds of 0, not 0 / 0.
    """
    total = _cumulative(a)[3]
    scale = torch.where(total < SMALL, SCALE_UP, SCALE_DOWN)
    a = tuple(a_i * scale for a_i in a)
    c = _cumulative(a)
    first = _first_above(c, uniform24(words[0]).mul_(c[3]))
    remaining = _cumulative(tuple(a_i.masked_fill(f_i, 0.0) for a_i, f_i in zip(a, first)))
    second = _first_above(remaining, uniform24(words[1]).mul_(remaining[3]))
    return tuple(
        (total / divisor).masked_fill_(~(f | s), 0.0)
        for divisor, f, s in zip(_divisors(a), first, second)
    )


def _divisors(a: Four) -> Four:
    """What the group's sum is divided by where an entry is kept: 1 + the others' odds."""
    low, high = a[0] + a[1] + TINY, a[2] + a[3] + TINY
    others = (a[1] + high, a[0] + high, low + a[3], low + a[2])
    odds = tuple(a_i / others_i for a_i, others_i in zip(a, others))
    low, high = 1.0 + (odds[0] + odds[1]), 1.0 + (odds[2] + odds[3])
    return odds[1] + high, odds[0] + high, low + odds[3], low + odds[2]


def _approximate_kept(a: Four) -> Four:
    """The magnitudes that the approximate sampler gives entries if it keeps them."""
    total = _cumulative(a)[3]
    scale = torch.where(total < SMALL, SCALE_UP, SCALE_DOWN)
    return tuple(total / divisor for divisor in _divisors(tuple(a_i * scale for a_i in a)))


def _cumulative(a: Four) -> Four:
    c1 = a[0] + a[1]
    c2 = c1 + a[2]
    return a[0], c1, c2, c2 + a[3]


def _threshold(u: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """u * total, but below a positive total: the rounding of subnormals could reach it.

    One less in the bits is the next float below; for a total of zero that is a NaN, which fmin
    leaves out.
    """
    return torch.fmin(u.mul_(total), total.view(torch.int32).sub(1).view(torch.float32))


def _first_above(c: Four, t: torch.Tensor) -> Four:
    """One-hot: the first of the ascending `c` above `t`, the last one when none of the others is.

    (`t` is below a positive c[3]; when c[3] is zero the last magnitude turns out zero as well.)
    """
    above0, above1, above2 = c[0] > t, c[1] > t, c[2] > t
    return above0, above1 ^ above0, above2 ^ above1, ~above2
