"""SLoRB: what its start keeps, and its gradients against autograd on the folded matrix."""

from __future__ import annotations

import pytest
import torch

from megasparse.errors import ConfigError
from megasparse.kernels import prune24_mask
from megasparse.sparsity.autograd.linear import linear
from megasparse.sparsity.gemms.dense import DenseGemms
from megasparse.sparsity.shard import WeightShard
from megasparse.sparsity.slorb import (
    LowRankBranch,
    adapter_shard,
    fold,
    initial_adapter,
    initial_projection,
    projection_shard,
)

N, K, k = 12, 32, 8


def _parts():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(N, K, generator=generator, dtype=torch.float64)
    mask = prune24_mask(weight.float())
    effective = torch.where(mask, weight, torch.zeros((), dtype=weight.dtype))
    pruned = weight - effective
    adapter = pruned.view(N, K // k, k).sum(-1) / k
    return weight, mask, effective, adapter, generator


def test_the_start_keeps_the_sum_of_every_group():
    weight, mask, effective, adapter, _ = _parts()
    start = initial_adapter(weight, mask, k)
    torch.testing.assert_close(start, adapter, rtol=1e-6, atol=1e-7)
    projection = initial_projection(WeightShard((K // k, K)), k).double()
    for p in (None, projection):
        whole = fold(effective, adapter, p)
        torch.testing.assert_close(
            whole.view(N, -1, k).sum(-1), weight.view(N, -1, k).sum(-1), rtol=1e-10, atol=1e-12
        )
    assert torch.equal(fold(effective, adapter, None), fold(effective, adapter, projection))


@pytest.mark.parametrize("trained", [False, True])
def test_output_and_gradients_equal_those_of_the_folded_matrix(trained):
    weight, _, effective, adapter, generator = _parts()
    x, dz = (torch.randn(5, 3, size, generator=generator, dtype=torch.float64) for size in (K, N))
    projection = torch.randn(K // k, K, generator=generator, dtype=torch.float64)
    x.requires_grad_()
    parts = [t.clone().requires_grad_() for t in (weight, adapter, projection)]
    z = linear(
        x,
        parts[0],
        DenseGemms(effective),
        branch=LowRankBranch(k),
        adapter=parts[1],
        projection=parts[2] if trained else None,
    )
    z.backward(dz)
    found = [x.grad, parts[1].grad] + ([parts[2].grad] if trained else [])
    x2 = x.detach().clone().requires_grad_()
    parts2 = [t.clone().requires_grad_() for t in (adapter, projection)]
    z2 = x2 @ fold(effective, parts2[0], parts2[1] if trained else None).t()
    z2.backward(dz)
    expected = [x2.grad, parts2[0].grad] + ([parts2[1].grad] if trained else [])
    torch.testing.assert_close(z, z2)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    # The weight's own gradient passes straight through the mask, and knows nothing of the branch.
    expected_w = dz.reshape(-1, N).t() @ x.detach().reshape(-1, K)
    torch.testing.assert_close(parts[0].grad, expected_w)


def test_shards_of_the_branch_are_shards_of_the_whole():
    column = WeightShard((N, K), 0, 1, 2)
    assert adapter_shard(column, k) == WeightShard((N, K // k), 0, 1, 2)
    assert projection_shard(column, k).dim is None
    row = WeightShard((N, K), 1, 1, 2)
    assert adapter_shard(row, k) == WeightShard((N, K // k), 1, 1, 2)
    whole = initial_projection(WeightShard((K // k, K)), k)
    part = initial_projection(projection_shard(row, k), k)
    assert torch.equal(part, whole[:, K // 2 :]) and part.sum() == K // 2
    with pytest.raises(ConfigError, match="slorb_k 32 does not divide the 16 inputs"):
        adapter_shard(row, 32)
