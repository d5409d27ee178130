"""The definition of `expert_rows`, in plain torch on any device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from megasparse.kernels.expert_rows import Segments

Result = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]


def expert_rows(
    counts: Sequence[int],
    rooms: Sequence[int],
    device: torch.device,
    segments: Segments | None,
    ascending: bool,
    tokens_T: torch.Tensor | None,
) -> Result:
    """Sources, spots, groups and tokens; see `megasparse.kernels.expert_rows`."""
    tokens, rows = sum(counts), sum(rooms)
    count, room = torch.tensor([list(counts), list(rooms)], device=device)
    expert = torch.repeat_interleave(
        torch.arange(len(counts), device=device), count, output_size=tokens
    )
    first_rows, first_tokens = room.cumsum(0) - room, count.cumsum(0) - count
    number = torch.arange(tokens, device=device)
    if segments is None:
        spots = number - first_tokens[expert] + first_rows[expert]
        sources, of_tokens = (_sources(values, spots, rows) for values in (number, tokens_T))
        assert sources is not None
        return sources, spots, None, of_tokens
    places, of_expert = segments.places, segments.number
    segment = expert * of_expert + places // segments.tokens
    # Stable: also where a place occurs twice.
    order = torch.argsort(segment * segments.tokens + places % segments.tokens, stable=True)
    sizes = torch.zeros(len(counts) * of_expert, dtype=torch.int64, device=device)
    sizes.index_add_(0, segment, torch.ones_like(segment))
    padded = (sizes + 3) // 4 * 4
    per_expert = padded.view(-1, of_expert)
    starts = (first_rows[:, None] + per_expert.cumsum(1) - per_expert).flatten()
    begins = sizes.cumsum(0) - sizes
    sorted_segment = segment[order]
    sorted_spots = starts[sorted_segment] + number - begins[sorted_segment]
    spots = torch.empty_like(order).index_copy_(0, order, sorted_spots)
    # The first row of a group is a token, or all four are zeros.
    numbers = (places * segments.total + segments.first + expert) % (1 << 32)
    by_row = places.new_zeros(rows).index_copy_(0, spots, numbers)
    sources, of_tokens = (_sources(values, spots, rows) for values in (number, tokens_T))
    assert sources is not None
    return sources, spots, by_row[::4].contiguous(), of_tokens


def _sources(values: torch.Tensor | None, spots: torch.Tensor, rows: int) -> torch.Tensor | None:
    """int32 (rows,): the values at their spots, -1 elsewhere."""
    if values is None:
        return None
    none = torch.full((rows,), -1, dtype=torch.int32, device=spots.device)
    return none.index_copy_(0, spots, values.int())
