"""Chunks of a sequence on context parallel ranks, and the draws of their places."""

from __future__ import annotations

import pytest
import torch

from megasparse.kernels import mvue24
from megasparse.megatron.context.chunks import by_rank, in_order, own_chunks, own_places
from megasparse.sparsity.gemms.dense import ReferenceSparseGemms
from megasparse.sparsity.gemms.protocol import GradOutput
from megasparse.sparsity.recipe import make_recipe
from megasparse.sparsity.shard import ShardSlice, TokenShare


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_token_is_once_somewhere_and_work_is_equal(size):
    length = 24 * size
    places = [[p for run in own_places(length, rank, size) for p in run] for rank in range(size)]
    assert sorted(sum(places, [])) == list(range(length))
    assert len({sum(one) for one in places}) == 1  # keys that causal queries see
    whole = torch.arange(length * 6).view(length, 3, 2)
    parts = [own_chunks(whole, 0, rank, size) for rank in range(size)]
    for part, own in zip(parts, places, strict=True):
        assert torch.equal(part, whole[own])
    assert torch.equal(torch.cat(parts), by_rank(whole, size))
    assert torch.equal(in_order(torch.cat(parts), size), whole)
    turned = own_chunks(whole.transpose(0, 1), 1, size - 1, size)
    assert torch.equal(turned, parts[-1].transpose(0, 1))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_rank_draws_what_its_tokens_draw_in_the_whole(size):
    """Tokens are sequence by micro-batch, as in a layer."""
    sequence, batch, channels = 32, 3, 8
    dz = torch.randn(sequence, batch, channels, generator=torch.Generator().manual_seed(0))
    whole = mvue24(dz.view(-1, channels), seed=5, dim=0).view(dz.shape)
    section = (ShardSlice(0, 0, channels),)
    for rank in range(size):
        gemms = ReferenceSparseGemms(make_recipe("fst"), section, tokens=TokenShare(rank, size))
        here = own_chunks(dz, 0, rank, size).reshape(-1, channels)
        x = torch.eye(len(here))  # so that the weight's gradient is the draw itself
        drawn = gemms.grad_weight(GradOutput(here, 5), (x,))
        assert torch.equal(drawn.t(), own_chunks(whole, 0, rank, size).reshape(-1, channels))
