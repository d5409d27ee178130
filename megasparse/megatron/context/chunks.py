"""Which tokens of a sequence a context parallel rank has: two chunks, so that all have equal work.

A sequence is cut into 2 cp chunks, and rank r has chunks r and 2 cp - 1 - r, as in Megatron: a
causal query attends to what is before it, so the early chunk makes up for the late one.

    cp 2:    0 1 | 2 3 | 4 5 | 6 7      rank 0 has 0 1 6 7, rank 1 has 2 3 4 5
"""

from __future__ import annotations

import torch


def own_places(length: int, rank: int, size: int) -> list[range]:
    """Where this rank's two chunks lie in a sequence of `length` tokens; one range without CP.

    Args:
        length: of the whole sequence, a multiple of 2 x size.
        rank, size: of context parallelism.
    """
    if size == 1:
        return [range(length)]
    chunk = length // (2 * size)
    firsts = (rank * chunk, (2 * size - 1 - rank) * chunk)
    return [range(first, first + chunk) for first in firsts]


def own_chunks(whole: torch.Tensor, dim: int, rank: int, size: int) -> torch.Tensor:
    """This rank's tokens of a tensor with whole sequences along `dim`, in order."""
    if size == 1:
        return whole
    places = own_places(whole.shape[dim], rank, size)
    return torch.cat([whole.narrow(dim, p.start, len(p)) for p in places], dim)


def in_order(gathered: torch.Tensor, size: int) -> torch.Tensor:
    """`(S, ...)` in order of the places, of the tokens of all ranks one after the other."""
    if size == 1:
        return gathered
    chunks = gathered.chunk(2 * size)
    early, late = chunks[::2], chunks[1::2]
    return torch.cat([*early, *reversed(late)])


def by_rank(whole: torch.Tensor, size: int) -> torch.Tensor:
    """The reverse of `in_order`."""
    if size == 1:
        return whole
    return torch.cat([own_chunks(whole, 0, rank, size) for rank in range(size)])
