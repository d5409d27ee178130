"""Triton kernels of `expert_rows`: two launches, of which the first makes a small table.

    segments    a program an expert: where each of its segments begins, among its tokens and rows
    rows        a program some rows of an expert: their segment, token and group

Both find things by halving what is left: the tokens of an expert ascend by their places. Where they
do not yet, torch sorts them before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from megasparse.kernels.expert_rows import Segments

# Segments that a program finds at a time, and rows of a program.
AT_A_TIME, ROWS = 64, 256


@triton.jit
def _first_not_below(places_ptr, begin, end, wanted):
    """Of ascending places from `begin` to `end`: where the first lies that is not below `wanted`,
    entry by entry; `end` where there is none."""
    low, high = wanted * 0 + begin, wanted * 0 + end
    left = end - begin
    while left > 0:
        middle = (low + high) // 2
        open_ = low < high
        right = open_ & (tl.load(places_ptr + middle, mask=open_, other=0) < wanted)
        low, high = tl.where(right, middle + 1, low), tl.where(right, high, middle)
        left = left // 2
    return low


@triton.jit(do_not_specialize=["segment_tokens", "segments"])
def _expert_segments_kernel(
    places_ptr,
    begins_ptr,
    table_ptr,
    segment_tokens,
    segments,
    AT_A_TIME: tl.constexpr,
):
    """Of each segment from an expert's first one to its last: two numbers, relative to the expert's
    own first token and row."""
    expert = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(begins_ptr + 2 * expert), tl.load(begins_ptr + 2 * expert + 2)
    size = tl.cast(segment_tokens, tl.int64)
    if end > begin:
        first = tl.load(places_ptr + begin) // size
        last = tl.minimum(tl.load(places_ptr + end - 1) // size, segments - 1)
        row = begin * 0
        while first <= last:
            segment = first + tl.arange(0, AT_A_TIME)
            low = _first_not_below(places_ptr, begin, end, segment * size)
            high = _first_not_below(places_ptr, begin, end, (segment + 1) * size)
            room = (high - low + 3) // 4 * 4
            out = table_ptr + 2 * (expert * segments + segment)
            tl.store(out, low - begin, mask=segment <= last)
            tl.store(out + 1, row + tl.cumsum(room, 0) - room, mask=segment <= last)
            row += tl.sum(room, 0)
            first += AT_A_TIME


@triton.jit(do_not_specialize=["segment_tokens", "segments", "first_expert", "experts"])
def _expert_rows_kernel(
    places_ptr,
    order_ptr,
    begins_ptr,
    table_ptr,
    tokens_ptr,
    sources_ptr,
    spots_ptr,
    groups_ptr,
    out_tokens_ptr,
    segment_tokens,
    segments,
    first_expert,
    experts,
    ROWS: tl.constexpr,
):
    """Rows of an expert; places and table: None without segments, order: where tokens ascend."""
    expert = tl.program_id(1).to(tl.int64)
    at = begins_ptr + 2 * expert
    begin, first_row = tl.load(at), tl.load(at + 1)
    end, last_row = tl.load(at + 2), tl.load(at + 3)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < last_row - first_row
    count = end - begin
    token, held = begin + row, row < count
    if places_ptr is not None:
        # Of an expert without tokens nothing is looked for, and nothing held.
        some = count > 0
        segment_tokens = tl.cast(segment_tokens, tl.int64)
        low = tl.load(places_ptr + begin, mask=some, other=0) // segment_tokens
        high = tl.load(places_ptr + end - 1, mask=some, other=0) // segment_tokens
        low, high = tl.minimum(low, segments - 1), tl.minimum(high, segments - 1)
        left, last = high - low, high
        table_ptr += 2 * expert * segments
        # The last segment that begins at a row not above: segments without tokens begin where the
        # next one does.
        low, high = row * 0 + low, row * 0 + high
        while left > 0:
            middle = (low + high + 1) // 2
            open_ = low < high
            start = tl.load(table_ptr + 2 * middle + 1, mask=open_, other=0)
            right = open_ & (start <= row)
            low, high = (
                tl.where(right, middle, low),
                tl.where(right | (low == high), high, middle - 1),
            )
            left = left // 2
        found = inside & some
        mine = table_ptr + 2 * low
        before = tl.load(mine, mask=found, other=0)
        after = tl.load(mine + 2, mask=found & (low < last), other=0)
        after = tl.where(low < last, after, count)
        token = before + row - tl.load(mine + 1, mask=found, other=0)
        held = found & (token < after)
        token += begin
    held = held & inside
    number = row * 0
    if places_ptr is not None:
        place = tl.load(places_ptr + token, mask=held, other=0)
        number = (place * experts + first_expert + expert) & 0xFFFFFFFF
        number = tl.where(held, number, 0)
    if order_ptr is not None:
        token = tl.load(order_ptr + token, mask=held, other=0)
    tl.store(sources_ptr + first_row + row, tl.where(held, token, -1).to(tl.int32), mask=inside)
    tl.store(spots_ptr + token, first_row + row, mask=held)
    if tokens_ptr is not None:
        whose = tl.load(tokens_ptr + token, mask=held, other=-1).to(tl.int32)
        tl.store(out_tokens_ptr + first_row + row, whose, mask=inside)
    if groups_ptr is not None:
        tl.store(groups_ptr + (first_row + row) // 4, number, mask=inside & (row % 4 == 0))


def expert_rows(
    counts: Sequence[int],
    rooms: Sequence[int],
    device: torch.device,
    segments: Segments | None,
    ascending: bool,
    tokens_T: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """See reference.py."""
    tokens, rows, most = sum(counts), sum(rooms), max(rooms)
    begins = _begins(counts, rooms).to(device, non_blocking=True)
    sources = torch.empty(rows, dtype=torch.int32, device=device)
    spots = torch.empty(tokens, dtype=torch.int64, device=device)
    places = order = table = groups = None
    how = (1, 1, 0, 1)
    if segments is not None:
        how = (segments.tokens, segments.number, segments.first, segments.total)
        places = segments.places.contiguous()
        groups = torch.empty(rows // 4, dtype=torch.int64, device=device)
        if not ascending:
            places, order = _in_order(counts, segments, begins)
        table = torch.empty(len(counts) * segments.number, 2, dtype=torch.int64, device=device)
    of_tokens = None if tokens_T is None else torch.empty_like(sources)
    if not rows:
        return sources, spots, groups, of_tokens
    with torch.cuda.device_of(sources):  # Triton launches on the current device
        if places is not None and tokens:
            _expert_segments_kernel[(len(counts),)](
                places, begins, table, *how[:2], AT_A_TIME=AT_A_TIME, num_warps=2
            )
        _expert_rows_kernel[(triton.cdiv(most, ROWS), len(counts))](
            places,
            order,
            begins,
            table,
            None if tokens_T is None else tokens_T.contiguous(),
            sources,
            spots,
            groups,
            of_tokens,
            *how,
            ROWS=ROWS,
            num_warps=4,
        )
    return sources, spots, groups, of_tokens


def _begins(counts: Sequence[int], rooms: Sequence[int]) -> torch.Tensor:
    """int64 (E + 1, 2) on the host: each expert's first token and row, and what comes after all."""
    token = row = 0
    flat = [0, 0]
    for count, room in zip(counts, rooms, strict=True):
        token, row = token + count, row + room
        flat += (token, row)
    return torch.tensor(flat, dtype=torch.int64).view(-1, 2)


def _in_order(
    counts: Sequence[int], segments: Segments, begins: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The places, those of each expert ascending, and which tokens they are of."""
    number = torch.arange(len(segments.places), device=begins.device)
    expert = torch.searchsorted(begins[1:, 0].contiguous(), number, right=True)
    keys = torch.add(segments.places, expert, alpha=segments.tokens * segments.number)
    order = torch.sort(keys, stable=True).indices
    return segments.places[order], order
