"""The tokens that have come to the experts of a rank, and their order for the GEMMs.

MVUE samples groups of four tokens. Which tokens are a group, and which numbers it draws, must not
depend on the rank that an expert is on, nor on who else's tokens are there: a group has tokens of
one segment of a micro-batch alone (`config/segments.py`), in their order, and draws the numbers of
its first token. They are neighbours among an expert's tokens, whatever the recipe says of other
layers.

All linears of an expert read its tokens in one order: brought into it once, in whole tiles of the
GEMMs, they need no other for any of the three.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ExpertTokens:
    """The rows that the GEMMs of experts read: sorted by expert, each one's in whole tiles.

    Attributes:
        counts: rows of each expert, with the zeros that fill them up.
        groups: int64 (T' / 4,), below 2^32: what each group of four rows draws by; None: nobody
            draws.
        spots: int64 (T,), of every token its row; None: rows are the tokens, as they came.
    """

    counts: list[int]
    groups: torch.Tensor | None = None
    spots: torch.Tensor | None = None

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """`x (T, ...)` of the tokens as rows `(T', ...)`; zeros where no token is."""
        if self.spots is None:
            return x
        return x.new_zeros(sum(self.counts), *x.shape[1:]).index_copy_(0, self.spots, x)

    def tokens(self, rows: torch.Tensor) -> torch.Tensor:
        """The reverse."""
        return rows if self.spots is None else rows[self.spots]


@dataclass(frozen=True)
class Arrivals:
    """The tokens that have come to the experts of a rank, sorted by expert.

    Attributes:
        counts: tokens of each expert.
        places: int64 (T,), of each token its place in the batch of the step: micro-batch x tokens
            of a micro-batch + token. None where nobody draws.
        tokens: of a segment.
        first, total: the number of the first expert, and of all experts of the layer.
    """

    counts: list[int]
    places: torch.Tensor | None = None
    tokens: int = 1
    first: int = 0
    total: int = 1

    def in_tiles(self, tile: int, draws: bool, device: torch.device) -> ExpertTokens:
        """The rows that GEMMs read.

        Args:
            tile: the rows of an expert are a multiple of it; if it is above 1 there is at least one
                row, of zeros.
            draws: whether there are to be groups for MVUE.
        """
        if draws:
            return self._in_groups(max(tile, 4))
        if tile == 1:
            return ExpertTokens(self.counts)
        whole = self._at_least_one([-(-count // tile) * tile for count in self.counts], tile)
        before = 0
        shifts = []
        for count, room in zip(self.counts, whole, strict=True):
            shifts.append(before)
            before += room - count
        counts = torch.tensor([self.counts, shifts], device=device)
        shift = torch.repeat_interleave(counts[1], counts[0], output_size=sum(self.counts))
        return ExpertTokens(whole, None, torch.arange(len(shift), device=device) + shift)

    def _in_groups(self, tile: int) -> ExpertTokens:
        """Waits for the device, which counts the tokens of each segment."""
        assert self.places is not None, "no places were sent with the tokens"
        places, device = self.places, self.places.device
        if not len(places):
            zeros = self._at_least_one([0] * len(self.counts), tile)
            return ExpertTokens(zeros, places.new_zeros(tile // 4), places)
        counts = torch.tensor(self.counts, device=device)
        expert = torch.repeat_interleave(
            torch.arange(len(counts), device=device), counts, output_size=len(places)
        )
        segments = int(places.max()) // self.tokens + 1
        segment = expert * segments + places // self.tokens
        order = torch.argsort(segment * self.tokens + places % self.tokens)
        segment = segment[order]
        sizes = torch.bincount(segment, minlength=len(counts) * segments).view(-1, segments)
        padded = (sizes + 3) // 4 * 4
        # What is left to a tile for an expert comes behind its last segment.
        room = padded.sum(1)
        whole = (room + tile - 1) // tile * tile
        starts = (whole.cumsum(0) - whole)[:, None] + padded.cumsum(1) - padded
        begins = (sizes.reshape(-1).cumsum(0) - sizes.reshape(-1))[segment]
        sorted_spots = starts.reshape(-1)[segment] + torch.arange(len(order), device=device)
        sorted_spots -= begins
        spots = torch.empty_like(order).index_copy_(0, order, sorted_spots)
        per_expert: list[int] = whole.tolist()
        # The first row of a group is a token, or all four are zeros.
        numbers = (places * self.total + self.first + expert) % (1 << 32)
        by_row = places.new_zeros(sum(per_expert)).index_copy_(0, spots, numbers)
        return ExpertTokens(per_expert, by_row[::4].contiguous(), spots)

    @staticmethod
    def _at_least_one(counts: list[int], tile: int) -> list[int]:
        """Somewhere a tile, so that no operand is empty."""
        return counts if any(counts) else [tile, *counts[1:]]
