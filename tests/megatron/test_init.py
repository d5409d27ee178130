"""Initial weights by name and seed: whole parameters by reference, experts in any layout."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import pytest
import torch

from megasparse.megatron.init import (
    initialize_weights,
    mark_experts,
    mark_sharded,
    parameter_shard,
)
from megasparse.sparsity.shard import WeightShard


def _model(**shapes: tuple[int, ...]) -> Any:
    """A module with parameters of these names, `__` for a dot."""
    model = torch.nn.Module()
    for name, shape in shapes.items():
        *parents, last = name.split("__")
        node = model
        for parent in parents:
            if parent not in node._modules:
                node.add_module(parent, torch.nn.Module())
            node = node._modules[parent]  # type: ignore[assignment]
        node.register_parameter(last, torch.nn.Parameter(torch.full(shape, math.nan)))
    return model


def _reference(key: str, shape: tuple[int, ...], std: float) -> torch.Tensor:
    """Same seed, same bits, in every version."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "little")
    drawn = torch.empty(shape)
    return drawn.normal_(0.0, std, generator=torch.Generator().manual_seed(seed))


def test_every_kind_of_parameter_begins_by_its_rule():
    model = _model(
        norm__weight=(4,),
        norm__bias=(4,),
        linear_fc1__weight=(6, 4),
        linear_fc1__bias=(6,),
        linear_fc2__weight=(4, 6),
        linear_proj__weight=(4, 4),
        word__weight=(8, 4),
    )
    initialize_weights(model, 5, 0.5, 8, 0, 1)
    found = dict(model.named_parameters())
    assert found["norm.weight"].tolist() == [1.0] * 4
    assert not found["norm.bias"].any() and not found["linear_fc1.bias"].any()
    for name, std in (
        ("word.weight", 0.5),
        ("linear_fc1.weight", 0.5),
        ("linear_fc2.weight", 0.125),
        ("linear_proj.weight", 0.125),
    ):
        expected = _reference(f"5:{name}", tuple(found[name].shape), std)
        assert torch.equal(found[name], expected), name


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("ep", [1, 2, 4])
@pytest.mark.parametrize(
    ("name", "dim", "parts", "rows", "columns"),
    [("linear_fc1", 0, 1, 8, 6), ("linear_fc1", 0, 2, 8, 6), ("linear_fc2", 1, 1, 6, 8)],
)
def test_an_expert_is_the_same_in_every_layout(name, dim, parts, rows, columns, tp, ep):
    """Four experts, each drawn by itself and then cut."""
    here = 4 // ep
    shard = WeightShard((rows, columns), dim, 0, tp, parts)
    std = 0.5 / math.sqrt(2 * 3) if name == "linear_fc2" else 0.5
    whole = [_reference(f"5:{name}.weight:{n}", (rows, columns), std) for n in range(4)]
    for block in range(ep):
        for rank in range(tp):
            local = shard.local_shape
            model = _model(**{f"{name}__weight": (here * local[0], local[1])})
            weight = getattr(model, name).weight
            own = WeightShard((rows, columns), dim, rank, tp, parts)
            mark_sharded(
                weight,
                WeightShard((here * rows, columns), dim, rank, tp, parts * here if dim == 0 else 1),
            )
            mark_experts(weight, here, block, ep)
            initialize_weights(model, 5, 0.5, 3, rank, tp)
            expected = [own.slice_of(whole[block * here + n]) for n in range(here)]
            assert torch.equal(weight, torch.cat(expected))


def test_marks_of_experts_say_whose_gradients_are_summed_apart():
    for blocks, apart in ((1, False), (2, True)):
        weight: Any = torch.nn.Parameter(torch.zeros(4, 2))
        mark_experts(weight, 2, 0, blocks)
        assert weight.experts_here == 2 and weight.expert_block == (0, blocks)
        assert hasattr(weight, "allreduce") == hasattr(weight, "group_name") == apart
        if apart:
            assert weight.allreduce is False and weight.group_name == "experts"


def test_where_a_parameter_lies_follows_from_its_marks():
    weight: Any = torch.nn.Parameter(torch.zeros(6, 4))
    assert parameter_shard(weight, 1, 2) == WeightShard((6, 4))
    mark_sharded(weight, WeightShard((12, 4), 0, 1, 2, 2))
    assert parameter_shard(weight, 1, 2) == WeightShard((12, 4), 0, 1, 2, 2)
    assert parameter_shard(weight, 0, 1) == WeightShard((6, 4))
    del weight.partition_stride
    assert parameter_shard(weight, 1, 2) == WeightShard((12, 4), 0, 1, 2, 1)
    weight.expert_block = (1, 3)
    assert parameter_shard(weight, 1, 2) == WeightShard((36, 4), 0, 1, 2, 1, 1, 3)
    assert parameter_shard(weight, 0, 1) == WeightShard((18, 4), block=1, blocks=3)
    weight.partition_dim = 1
    assert parameter_shard(weight, 1, 2) == WeightShard((18, 8), 1, 1, 2, 1, 1, 3)
    weight.ds_shape = (2, 4)  # ZeRO 3 keeps it aside
    assert parameter_shard(weight, 1, 2).global_shape == (6, 8)
