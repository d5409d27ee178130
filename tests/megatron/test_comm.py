"""What linears exchange, with stand-ins for the group: shapes, values, and who waits for whom."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megasparse.megatron import added_parameters
from megasparse.megatron.comm import linear as module
from megasparse.megatron.comm import slorb
from megasparse.megatron.comm.linear import (
    GatherOverSequence,
    SumOverTensorParallel,
    exchange_through,
    sum_over_sequence,
)
from megasparse.megatron.comm.slorb import SplitOverRank, SumOfProjections
from megasparse.sparsity.shard import WeightShard
from megasparse.sparsity.slorb import LocalLowRankComm
from tests.megatron.test_sequence_parts import Group

SIZE = 2


class Exchange:
    """Two ranks, of which the other has values ten times as large; work is done when waited for."""

    def __init__(self, monkeypatch) -> None:
        self.calls: list[str] = []
        for kind in (module, slorb):
            monkeypatch.setattr(kind, "dist", self)

    def _later(self, name: str, run: Any, later: bool) -> Any:
        self.calls.append(name)
        if not later:
            return run()
        return SimpleNamespace(wait=run)

    def all_reduce(self, x: torch.Tensor, group: Any, async_op: bool = False) -> Any:
        return self._later("all_reduce", lambda: x.mul_(11), async_op)

    def all_gather_into_tensor(self, whole: Any, x: Any, group: Any, async_op=False) -> Any:
        return self._later("gather", lambda: whole.copy_(torch.cat([x, 10 * x])), async_op)

    def reduce_scatter_tensor(self, part: Any, x: Any, group: Any, async_op=False) -> Any:
        return self._later("scatter", lambda: part.copy_(11 * x[: len(part)]), async_op)


def test_gradients_of_a_whole_input_are_summed(monkeypatch):
    exchange = Exchange(monkeypatch)
    comm = SumOverTensorParallel(Group(0, SIZE))  # type: ignore[arg-type]
    x = torch.randn(4, 2, 3)
    whole, arrived = comm.gather(x)
    arrived()
    assert whole is x and not exchange.calls and not comm.gathers
    assert comm.own_part(4096) is None
    part, wait = comm.reduce(x.transpose(0, 1))
    before = part.clone()
    wait()
    assert torch.equal(part, 11 * before) and part.is_contiguous()


def test_a_split_sequence_is_gathered_and_summed(monkeypatch):
    exchange = Exchange(monkeypatch)
    group: Any = Group(1, SIZE)
    comm = GatherOverSequence(group, "input")
    assert comm.gathers and comm.peers is None
    x = torch.randn(4, 2, 3)
    whole, arrived = comm.gather(x)
    arrived()
    assert torch.equal(whole, torch.cat([x, 10 * x]))
    part, wait = comm.reduce(whole)
    wait()
    assert torch.equal(part, 11 * x)
    z = torch.randn(4, 2, 3).requires_grad_()
    summed = sum_over_sequence(z, comm)
    assert torch.equal(summed, 11 * z[:2])
    grad = torch.randn(2, 2, 3)
    summed.backward(grad)
    assert torch.equal(z.grad, torch.cat([grad, 10 * grad]))
    assert exchange.calls == ["gather", "scatter", "scatter", "gather"]


def test_peers_exchange_by_name_and_enough_tokens_are_multiplied_apart():
    class Peers:
        def gather(self, name: str, x: Any) -> Any:
            return name, x

        reduce = gather

    group: Any = Group(3, 4)
    column, row = (GatherOverSequence(group, side) for side in ("input", "output"))
    assert column.own_part(4096) is None
    model = torch.nn.ModuleList([torch.nn.Module() for _ in range(3)])
    for one, comm in zip(model, (column, row, SumOverTensorParallel(group)), strict=True):
        one.comm = comm  # type: ignore[assignment]
    peers: Any = Peers()
    exchange_through(model, peers)
    assert column.peers is row.peers is peers
    assert not hasattr(model[2].comm, "peers")
    x: Any = torch.ones(1)
    assert column.gather(x) == ("gather of the input", x)
    assert row.reduce(x) == ("sum of the output", x)
    assert column.own_part(1024) == 3 * 1024 and column.own_part(1023) is None
    exchange_through(model, None)
    assert column.peers is None


def test_low_rank_parts_are_summed_or_split_over_the_rank(monkeypatch):
    exchange = Exchange(monkeypatch)
    group: Any = Group(0, SIZE)
    whole, split = SumOfProjections(group), SplitOverRank(group)
    h = torch.randn(5, 4)
    assert whole.scatter(h) is h and whole.gather(h) is h
    expected = 11 * h
    assert torch.equal(whole.reduce(h.clone().t()), expected.t())
    assert torch.equal(split.scatter(h), expected[:, :2])
    assert torch.equal(split.gather(h), torch.cat([h, 10 * h], 1))
    assert split.reduce(h) is h
    assert exchange.calls == ["all_reduce", "scatter", "gather"]


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_low_rank_branch_is_cut_as_its_layer(dim, trained, ranks):
    layer: Any = added_parameters.AddedParameters()
    layer.shard = WeightShard((16, 32), dim if ranks > 1 else None, 0, ranks)
    layer.tp_group = Group(0, ranks)
    weight = torch.randn(layer.shard.local_shape, generator=torch.Generator().manual_seed(0))
    layer.weight = torch.nn.Parameter(weight)
    assert layer.scaled_weight() is layer.weight and layer.initial_low_rank_weights() == []
    layer.add_low_rank_branch(4, trained)
    kind = LocalLowRankComm
    if ranks > 1 and trained:
        kind = (SumOfProjections, SplitOverRank)[dim]  # type: ignore[assignment]
    assert type(layer._branch._comm) is kind
    values = layer.initial_low_rank_weights()
    assert [parameter for parameter, _ in values] == [
        layer.slorb_adapter,
        *([layer.slorb_projection] if trained else []),
    ]
    assert (layer.slorb_projection is not None) == trained
    for parameter, value in values:
        assert parameter.shape == value.shape and not parameter.any() and value.any()
    adapter = layer.slorb_adapter
    assert getattr(adapter, "partition_dim", None) == (dim if ranks > 1 else None)
    if trained:
        assert getattr(layer.slorb_projection, "partition_dim", None) == (
            1 if ranks > 1 and dim == 1 else None
        )


@pytest.mark.parametrize("ranks", [1, 2])
def test_scales_begin_with_one_and_are_cut_as_their_weight(ranks):
    layer: Any = added_parameters.AddedParameters()
    layer.shard = WeightShard((16, 32), 0 if ranks > 1 else None, 0, ranks)
    layer.weight = torch.nn.Parameter(torch.randn(layer.shard.local_shape))
    layer.add_weight_scale(4)
    scale = layer.weight_scale
    assert scale.shape == (16 // ranks, 4) and (scale == 1).all()
    assert getattr(scale, "partition_dim", None) == (0 if ranks > 1 else None)
    with torch.no_grad():
        scale[:, 1] = 3
    found = layer.scaled_weight()
    torch.testing.assert_close(found[:, 8:16], 3 * layer.weight[:, 8:16])
    torch.testing.assert_close(found[:, :8], layer.weight[:, :8])
