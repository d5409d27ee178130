"""Where pieces of tensors meet, against indices counted one by one; equal shares."""

from __future__ import annotations

import math
import random

import pytest
import torch

from megasparse.checkpoint.pieces import Piece, common, divide, may_meet, owners, span
from megasparse.sparsity.shard import WeightShard


def _places(piece: Piece) -> list[int]:
    """The places of a piece's entries in the flattened whole, by slicing a tensor of them."""
    shape = piece.shard.global_shape
    whole = torch.arange(math.prod(shape)).reshape(shape)
    start, stop = piece.range
    return piece.shard.slice_of(whole).reshape(-1)[start:stop].tolist()


def _random_piece(generator: random.Random, shape: tuple[int, ...]) -> Piece:
    dim = generator.choice([None, *range(len(shape))])
    blocks = generator.choice([1, 1, 2, 4])
    inner = [shape[0] // blocks, *shape[1:]]
    worlds = [1] if dim is None else [n for n in (1, 2, 3, 4, 6) if inner[dim] % (2 * n) == 0]
    if not worlds:
        dim, worlds = None, [1]
    world = generator.choice(worlds)
    parts = generator.choice([1, 2]) if dim is not None else 1
    block = generator.randrange(blocks)
    shard = WeightShard(shape, dim, generator.randrange(world), world, parts, block, blocks)
    if generator.random() < 0.3:
        return Piece("k", shard)
    start, stop = sorted(generator.randrange(math.prod(shard.local_shape) + 1) for _ in range(2))
    return Piece("k", shard, start, stop)


def test_runs_are_the_common_entries_of_two_pieces():
    generator = random.Random(1)
    for _ in range(600):
        shape = generator.choice([(24,), (12, 8), (8, 12), (4, 6, 8)])
        wanted, stored = (_random_piece(generator, shape) for _ in range(2))
        ours, theirs = _places(wanted), _places(stored)
        found = {}
        for run in common(wanted, stored):
            assert run.length > 0
            for n in range(run.length):
                assert ours[run.wanted + n] == theirs[run.stored + n], (wanted, stored)
                assert run.wanted + n not in found
                found[run.wanted + n] = True
        assert len(found) == len(set(ours) & set(theirs)), (wanted, stored)


def test_a_span_is_the_first_and_the_last_place_and_no_meeting_is_denied():
    generator = random.Random(2)
    met = 0
    for _ in range(600):
        shape = generator.choice([(24,), (12, 8), (8, 12), (4, 6, 8)])
        one, other = (_random_piece(generator, shape) for _ in range(2))
        places = [_places(piece) for piece in (one, other)]
        for piece, found in zip((one, other), places, strict=True):
            if found:
                assert span(piece) == (found[0], found[-1]), piece
        if set(places[0]) & set(places[1]):
            met += 1
            assert may_meet(one, other), (one, other)
    assert met > 100


@pytest.mark.parametrize("world", [1, 2, 5, 64])
def test_shares_cover_everything_once_and_are_equal(world):
    generator = random.Random(world)
    for _ in range(50):
        sizes = [generator.choice([0, 1, 7, 1000, 40_000]) for _ in range(30)]
        taken = [0] * world
        for size, shares in zip(sizes, divide(sizes, world), strict=True):
            position = 0
            for share in shares:
                assert share.start == position < share.stop
                position = share.stop
                taken[share.rank] += share.stop - share.start
            assert position == size
        assert max(taken) - min(taken) <= 1
        assert all(0 <= owner < world for owner in owners(sizes, world))
        assert owners(sizes, world) == sorted(owners([s or 1 for s in sizes], world)) or 0 in sizes
