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

from megasparse.kernels import Routes, Segments, expert_rows, gather_rows, room_for, sum_rows


@dataclass(frozen=True)
class ExpertTokens:
    """The rows that the GEMMs of experts read: sorted by expert, each one's in whole tiles.

    Attributes:
        counts: rows of each expert, with the zeros that fill them up.
        groups: int64 (T' / 4,), below 2^32: what each group of four rows draws by; None: nobody
            draws.
        spots: int64 (n,), of everything that came its row; None: rows are the tokens, as they came.
        sources: int32 (T',), of every row what came, -1: nothing; there is one wherever spots are.
        tokens_of_rows: int32 (T',), of every row its token; None: what came are tokens.
        parts: int32 (T, k), of every token what came of it; None as well.
    """

    counts: list[int]
    groups: torch.Tensor | None = None
    spots: torch.Tensor | None = None
    sources: torch.Tensor | None = None
    tokens_of_rows: torch.Tensor | None = None
    parts: torch.Tensor | None = None

    @property
    def sources_of_tokens(self) -> torch.Tensor | None:
        """int32 (T',), of every row its token, -1: none; None: rows are the tokens."""
        return self.sources if self.tokens_of_rows is None else self.tokens_of_rows

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """`x (T, ...)` of the tokens as rows `(T', ...)`; zeros where no token is."""
        sources = self.sources_of_tokens
        return x if sources is None else gather_rows(x, sources)

    def tokens(self, rows: torch.Tensor) -> torch.Tensor:
        """The reverse: of a token's rows the sum."""
        if self.spots is None:
            return rows
        if self.parts is None:
            return rows.index_select(0, self.spots)
        return sum_rows(rows, self.spots, self.parts)

    def rows_of_weights(self, weights: torch.Tensor) -> torch.Tensor:
        """`(T',)` of what has one weight for everything that came, `(n,)`."""
        return weights if self.sources is None else gather_rows(weights, self.sources)

    def weights_of_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """The reverse."""
        return rows if self.spots is None else rows.index_select(0, self.spots)


@dataclass(frozen=True)
class Arrivals:
    """The tokens that have come to the experts of a rank, sorted by expert.

    Attributes:
        counts: tokens of each expert, n in all.
        places: int64 (n,), of each token its place in the batch of the step: micro-batch x tokens
            of a micro-batch + token. None where nobody draws.
        tokens: of a segment.
        first, total: the number of the first expert, and of all experts of the layer.
        segments: of the batch of the step, all places being below segments x tokens; None: the
            device is asked, and waited for.
        mixed: of how many segments an expert's tokens are at most; None: of any.
        ascending: the places of each expert ascend.
        routes: what came are parts of tokens: each token is there once, for all of its experts.
            None: tokens have come, once for each of their experts.
    """

    counts: list[int]
    places: torch.Tensor | None = None
    tokens: int = 1
    first: int = 0
    total: int = 1
    segments: int | None = None
    mixed: int | None = None
    ascending: bool = False
    routes: Routes | None = None

    def in_tiles(self, tile: int, draws: bool, device: torch.device) -> ExpertTokens:
        """The rows that GEMMs read. Nothing waits for the device where `segments` are known.

        Args:
            tile: the rows of an expert are a multiple of it; if it is above 1 there is at least one
                row, of zeros.
            draws: whether there are to be groups for MVUE. How many zeros fill up an expert's rows
                depends on the number of its tokens alone, not on where they come from.
        """
        if not draws and tile == 1 and self.routes is None:
            return ExpertTokens(self.counts)
        segments, rooms = None, self.counts
        if draws:
            segments, tile = self._segments(), max(tile, 4)
            mixed = segments.number if self.mixed is None else min(self.mixed, segments.number)
            rooms = [room_for(n, mixed) for n in self.counts]
        if tile > 1:
            rooms = self._whole(rooms, tile)
        tokens, parts = (None, None) if self.routes is None else self.routes[1:]
        sources, spots, groups, of_rows = expert_rows(
            self.counts, rooms, device, segments, ascending=self.ascending, tokens=tokens
        )
        return ExpertTokens(rooms, groups, spots, sources, of_rows, parts)

    def _segments(self) -> Segments:
        assert self.places is not None, "no places were sent with the tokens"
        count = self.segments
        if count is None:
            count = int(self.places.max()) // self.tokens + 1 if len(self.places) else 1
        return Segments(self.places, self.tokens, count, self.first, self.total)

    @staticmethod
    def _whole(counts: list[int], tile: int) -> list[int]:
        """In whole tiles; somewhere one, so that no operand is empty."""
        whole = [-(-count // tile) * tile for count in counts]
        return whole if any(whole) else [tile, *whole[1:]]
