"""A shard and its place in the whole: take and place are each other's adjoint."""

from __future__ import annotations

import pytest
import torch

from megasparse.errors import ConfigError
from megasparse.sparsity.shard import WeightShard


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


def test_indivisible_is_refused():
    with pytest.raises(ConfigError, match="not divisible by 2 fused parts x 3 ranks"):
        WeightShard((16, 24), 0, 0, 3, 2)


def test_a_shard_of_one_rank_is_the_whole():
    alone = WeightShard((8, 4), 0)
    assert alone.local_shape == (8, 4) and alone == WeightShard((8, 4), 0, 0, 1, 1)
    whole = torch.arange(32).view(8, 4)
    filled = torch.zeros_like(whole)
    alone.write_into(filled, whole)
    assert torch.equal(filled, whole)
