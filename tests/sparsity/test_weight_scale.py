"""Learnable scales of a weight: what they multiply, and where a shard of them lies."""

from __future__ import annotations

import pytest
import torch

from megasparse.errors import ConfigError
from megasparse.sparsity.shard import WeightShard
from megasparse.sparsity.weight_scale import scale_shard, scaled


def test_each_group_of_inputs_has_the_scale_of_its_row():
    w = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    a = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    found = scaled(w, a)
    for row in range(3):
        for column in range(8):
            assert found[row, column] == w[row, column] * a[row, column // 4]
    dz = torch.randn(3, 8, dtype=torch.float64)
    found.backward(dz)
    torch.testing.assert_close(a.grad, (dz * w).detach().view(3, 2, 4).sum(-1))
    torch.testing.assert_close(w.grad, dz * a.detach().repeat_interleave(4, 1))


@pytest.mark.parametrize(("dim", "world"), [(0, 2), (1, 2), (None, 1)])
def test_a_shard_of_scales_is_split_as_its_weight(dim, world):
    w, a = torch.randn(4, 16), torch.randn(4, 4)
    whole = scaled(w, a)
    for rank in range(world):
        weight = WeightShard((4, 16), dim, rank, world)
        own = scale_shard(weight, 4)
        assert own == WeightShard((4, 4), dim, rank, world)
        assert torch.equal(scaled(weight.slice_of(w), own.slice_of(a)), weight.slice_of(whole))


def test_groups_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="weight_scale_groups 3 of a weight of 16 inputs"):
        scale_shard(WeightShard((4, 16)), 3)
    with pytest.raises(ConfigError, match="groups 8 of a weight of 16 inputs"):  # of two inputs
        scale_shard(WeightShard((4, 16)), 8)
    with pytest.raises(ConfigError, match="groups 2 with tensor_model_parallel_size 4"):
        scale_shard(WeightShard((4, 32), 1, 0, 4), 2)
    assert scale_shard(WeightShard((4, 32), 0, 0, 4), 2).dim == 0  # rows are split, not groups
