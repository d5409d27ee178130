"""Rows of experts: every token once, in groups of one segment, whoever computes where they are."""

from __future__ import annotations

import pytest
import torch

from megasparse.errors import KernelError
from megasparse.kernels.expert_rows import Segments, expert_rows, room_for
from tests.kernels.poison import poison_new_tensors

BACKENDS = ["reference", "triton"]


def _places(counts: list[int], size: int, shuffled: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    own = [torch.randperm(size, generator=generator)[:n] for n in counts]
    return torch.cat([one if shuffled else one.sort()[0] for one in own])


def _by_hand(counts, rooms, places, tokens, first, total):
    """Token by token: sources, and what each group draws by."""
    sources, groups, begin = [], [], 0
    for expert, (count, room) in enumerate(zip(counts, rooms, strict=True)):
        rows: list[int] = []
        segment = None
        for t in sorted(range(begin, begin + count), key=lambda t: int(places[t])):
            if int(places[t]) // tokens != segment:
                rows += [-1] * (-len(rows) % 4)
            segment = int(places[t]) // tokens
            rows.append(t)
        rows += [-1] * (room - len(rows))
        sources += rows
        numbers = [(int(places[t]) * total + first + expert) % (1 << 32) for t in rows[::4]]
        groups += [n if t >= 0 else 0 for n, t in zip(numbers, rows[::4], strict=True)]
        begin += count
    return sources, groups


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize(
    ("counts", "tokens", "count", "tile"),
    [
        ([70, 0, 129], 16, 40, 128),
        ([0, 0, 0], 8, 2, 64),
        ([1], 1, 9, 4),
        ([9, 300, 0, 5], 3, 200, 4),  # more segments than a program finds at a time
        ([600, 2], 1000, 1, 64),  # one segment, several programs
    ],
)
def test_every_token_has_a_row_among_those_of_its_segment(
    device, monkeypatch, counts, tokens, count, tile, shuffled, backend
):
    places = _places(counts, tokens * count, shuffled) if sum(counts) else torch.zeros(0).long()
    rooms = [-(-room_for(n, count) // tile) * tile for n in counts]
    segments = Segments(places.to(device), tokens, count, 3, 1 << 29)
    with monkeypatch.context() as patch:
        poison_new_tensors(patch)
        found = expert_rows(
            counts,
            rooms,
            device,
            segments,
            ascending=not shuffled,
            tokens=7 * places.to(device),
            backend=backend,
        )
    sources, groups = _by_hand(counts, rooms, places, tokens, 3, 1 << 29)
    assert found.sources.dtype == torch.int32 and found.sources.tolist() == sources
    assert found.groups.tolist() == groups
    rows = {t: row for row, t in enumerate(sources) if t >= 0}
    assert found.spots.tolist() == [rows[t] for t in range(sum(counts))]
    assert found.tokens.tolist() == [-1 if t < 0 else 7 * int(places[t]) for t in sources]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("counts", [[3, 0, 130], [0, 300]])
def test_without_segments_tokens_keep_their_order(device, backend, counts):
    rooms = [-(-n // 64) * 64 for n in counts]
    sources, spots, groups, tokens = expert_rows(counts, rooms, device, backend=backend)
    expected, begin = [], 0
    for n, room in zip(counts, rooms, strict=True):
        expected += [*range(begin, begin + n), *[-1] * (room - n)]
        begin += n
    assert groups is None and tokens is None and sources.tolist() == expected
    assert spots.tolist() == [row for row, t in enumerate(expected) if t >= 0]


@pytest.mark.gpu
@pytest.mark.parametrize("ascending", [True, False])
def test_on_a_gpu_at_the_size_of_a_layer(device, ascending):
    """128 experts, tokens of 8 micro-batches of a step of 512."""
    generator = torch.Generator().manual_seed(3)
    tokens, each = 1024, 16
    batches = torch.arange(8 * each * tokens) + 100 * each * tokens
    chosen = torch.rand(128, len(batches), generator=generator) < 0.02
    own = [batches[one] for one in chosen]
    if not ascending:
        own = [one[torch.randperm(len(one), generator=generator)] for one in own]
    counts = [len(one) for one in own]
    rooms = [-(-room_for(n, 8 * each) // 128) * 128 for n in counts]
    places = torch.cat(own)
    found, expected = (
        expert_rows(
            counts,
            rooms,
            where,
            Segments(places.to(where), tokens, 512 * each, 256, 512),
            ascending=ascending,
        )
        for where in (device, torch.device("cpu"))
    )
    for ours, theirs in zip(found[:3], expected[:3], strict=True):
        assert torch.equal(ours.cpu(), theirs)


def test_room_is_enough_and_little():
    assert [room_for(n, 16) for n in (0, 1, 2, 4, 16, 100)] == [0, 4, 8, 16, 64, 148]
    assert room_for(100, 1) == 100 and room_for(101, 1) == 104


def test_refusals(device):
    places = torch.arange(4, device=device)
    for rooms in ([3], [6], [4, 4]):
        with pytest.raises(KernelError, match="expected room for all, in multiples of 4"):
            expert_rows([4], rooms, device, Segments(places, 4, 1))
    with pytest.raises(KernelError, match="places is a"):
        expert_rows([5], [8], device, Segments(places, 4, 1))
    with pytest.raises(KernelError, match="0 segments of 4"):
        expert_rows([4], [4], device, Segments(places, 4, 0))
