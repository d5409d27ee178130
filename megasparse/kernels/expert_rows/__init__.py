"""Which token each row of the experts' GEMMs has: sorted by expert, in groups for MVUE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from megasparse.errors import KernelError
from megasparse.kernels import dispatch
from megasparse.kernels.checks import GROUP, require
from megasparse.kernels.expert_rows import reference, triton


class Segments(NamedTuple):
    """How tokens are grouped for MVUE, and what groups draw by.

    Attributes:
        places: int64 (T,), of each token its place in the batch of the step; below number x tokens.
        tokens: of a segment; a group has tokens of one segment.
        number: of all segments of the step.
        first, total: the number of the first expert, and of all experts of the layer.
    """

    places: torch.Tensor
    tokens: int
    number: int
    first: int = 0
    total: int = 1


class ExpertRows(NamedTuple):
    """What `expert_rows` gives.

    Attributes:
        sources: int32 (T',), of every row its token; -1: none.
        spots: int64 (T,), of every token its row.
        groups: int64 (T' / 4,), below 2^32, what each group of four rows draws by; None: nobody
            draws.
        tokens: int32 (T',), of every row `tokens[sources]`, -1: none; None: none were given.
    """

    sources: torch.Tensor
    spots: torch.Tensor
    groups: torch.Tensor | None
    tokens: torch.Tensor | None


@torch.no_grad()
def expert_rows(
    counts: Sequence[int],
    rooms: Sequence[int],
    device: torch.device,
    segments: Segments | None = None,
    *,
    ascending: bool = False,
    tokens: torch.Tensor | None = None,
    backend: str | None = None,
) -> ExpertRows:
    """Tokens, sorted by expert, as rows: each expert's begin where a room begins.

    With segments the tokens of an expert are in the order of their places, those of each segment
    begin at a multiple of 4, and a group draws by `place x total + first + expert` of its first
    token, modulo 2^32; by 0 where it has none. Nothing waits for the device.

    Args:
        counts: tokens of each expert.
        rooms: rows of each, as many as `room_for` at least; multiples of 4 with segments.
        device: of the result.
        segments: None: tokens keep their order, and nobody draws.
        ascending: the places of an expert ascend already.
        tokens: int64 (T,), what each is a part of; below 2^31.
        backend: None, "reference" or "triton".

    Raises: KernelError when the arguments do not fit, or a backend that cannot run.
    """
    total = sum(counts)
    fits = len(counts) == len(rooms) and all(
        0 <= count <= room and (segments is None or not room % GROUP)
        for count, room in zip(counts, rooms, strict=False)
    )
    if not fits:
        raise KernelError(
            f"expert_rows: {list(counts)} tokens in {list(rooms)} rows, expected room for all"
            f"{'' if segments is None else ', in multiples of 4'}"
        )
    if segments is not None:
        require("expert_rows", "places", segments.places, torch.int64, (total,), device)
        if segments.tokens < 1 or segments.number < 1:
            raise KernelError(
                f"expert_rows: {segments.number} segments of {segments.tokens}, expected 1 at least"
            )
    require("expert_rows", "tokens", tokens, torch.int64, (total,), device)
    like = torch.empty(0, device=device) if segments is None else segments.places
    run = dispatch.implementation(
        "expert_rows",
        like,
        backend,
        reference=reference.expert_rows,
        triton=triton.expert_rows,
    )
    return ExpertRows(*run(counts, rooms, device, segments, ascending, tokens))


def room_for(count: int, segments: int) -> int:
    """Rows that are enough for an expert's tokens in groups of 4, whatever segments they are of.

    Args:
        count: tokens of the expert.
        segments: of which its tokens are at most.
    """
    parts = min(count, segments)
    most = count + (GROUP - 1) * parts
    return most // GROUP * GROUP
