"""A shard and its place in the whole: take and place are each other's adjoint."""

from __future__ import annotations

import pytest
import torch

from megasparse.errors import ConfigError
from megasparse.sparsity.shard import ALL_TOKENS, TokenShare, WeightShard


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize(("dim", "parts"), [(None, 1), (0, 1), (1, 1), (0, 2)])
def test_shards_make_up_the_whole(world, dim, parts):
    whole = torch.randn(16, 24)
    rebuilt = torch.full_like(whole, float("nan"))
    for rank in range(world):
        shard = WeightShard((16, 24), dim, rank, world, parts)
        part = shard.slice_of(whole)
        assert part.shape == shard.local_shape
        for d in (0, 1):
            for s in shard.slices(d):
                assert torch.equal(
                    part.narrow(d, s.local_start, s.length)
                    if d == dim
                    else whole.narrow(d, s.global_start, s.length),
                    (whole if d == dim else whole).narrow(d, s.global_start, s.length),
                )
        shard.write_into(rebuilt, part)
    assert torch.equal(rebuilt, whole)


def test_gate_and_up_are_sliced_each():
    whole = torch.arange(8.0)[:, None].expand(8, 2)
    rows = [WeightShard((8, 2), 0, r, 2, 2).slice_of(whole)[:, 0].tolist() for r in range(2)]
    assert rows == [[0, 1, 4, 5], [2, 3, 6, 7]]


@pytest.mark.parametrize("blocks", [1, 2, 3])
@pytest.mark.parametrize(("dim", "parts"), [(None, 1), (0, 1), (1, 1), (0, 2), (0, 3)])
def test_a_shard_of_a_block_is_that_of_the_block_alone(blocks, dim, parts):
    """Experts: equal blocks of dimension 0, each sharded as a weight of its own."""
    rows, columns, world = 12, 8, 2
    whole = torch.arange(blocks * rows * columns).view(blocks * rows, columns)
    rebuilt = torch.zeros_like(whole)
    for block in range(blocks):
        alone = whole[block * rows : (block + 1) * rows]
        for rank in range(world):
            shard = WeightShard((blocks * rows, columns), dim, rank, world, parts, block, blocks)
            part = shard.slice_of(whole)
            expected = WeightShard((rows, columns), dim, rank, world, parts).slice_of(alone)
            assert torch.equal(part, expected) and part.shape == shard.local_shape
            assert shard.block_shape == (rows, columns) and shard.block_start == block * rows
            assert shard.is_whole == (dim is None and blocks == 1)
            # Rows and columns lie where the slices say.
            places = [
                [one.global_start + n for one in shard.slices(d) for n in range(one.length)]
                for d in (0, 1)
            ]
            assert torch.equal(whole[places[0]][:, places[1]], part)
            for d in (0, 1):
                starts = [one.local_start for one in shard.slices(d)]
                lengths = [one.length for one in shard.slices(d)]
                assert starts == [sum(lengths[:n]) for n in range(len(lengths))]
            shard.write_into(rebuilt, part)
    assert torch.equal(rebuilt, whole)


def test_what_is_not_said_is_the_first_of_one():
    whole = torch.arange(8).view(8, 1)
    assert torch.equal(WeightShard((8, 1), blocks=2).slice_of(whole), whole[:4])
    assert TokenShare().places(6) == ((0, 0),) == ALL_TOKENS.places(8)
    assert TokenShare(size=2).places(6) == ((0, 0), (3, 9))
    assert TokenShare(1, 2).places(6) == ((0, 3), (3, 6))


def test_indivisible_is_refused():
    for rows, blocks in ((16, 3), (3, 2)):
        with pytest.raises(ConfigError, match=f"not divisible by {blocks} blocks of experts"):
            WeightShard((rows, 24), blocks=blocks)
    with pytest.raises(ConfigError, match=r"\(12, 24\) is not divisible by 4 fused parts x 2"):
        WeightShard((24, 24), 0, 0, 2, 4, blocks=2)
    WeightShard((3, 24))  # one block is whatever there is
    with pytest.raises(ConfigError, match="not divisible by 2 fused parts x 3 ranks"):
        WeightShard((16, 24), 0, 0, 3, 2)


def test_a_shard_of_one_rank_is_the_whole():
    alone = WeightShard((8, 4), 0)
    assert alone.local_shape == (8, 4) and alone == WeightShard((8, 4), 0, 0, 1, 1)
    whole = torch.arange(32).view(8, 4)
    filled = torch.zeros_like(whole)
    alone.write_into(filled, whole)
    assert torch.equal(filled, whole)
