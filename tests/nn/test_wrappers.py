"""DDP and FSDP2 on two ranks train as one rank does, and leave the same weights."""

from __future__ import annotations

import pytest
import torch

from tests import dist
from tests.nn.models import Model, micro_batch, train

SETTINGS: dict[str, dict] = {
    "fst": {"masked_decay": 1e-2, "mask_update_interval": 2},
    "ast": {"masked_decay": 1e-2, "masked_decay_ramp_iters": 0, "mask_update_interval": 2},
    "s_ste": {},
}
STEPS = 4


def _trained(rank: int, world: int, recipe: str, how: str, resumed: bool = False):
    """Some steps of two micro-batches over all ranks; masks, weights, losses, packings."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor
    from torch.nn.parallel import DistributedDataParallel

    from megasparse.nn import sparsify_

    model = Model()
    handle = sparsify_(model, recipe, ["*.mlp.*"], seed=5, **SETTINGS[recipe])
    net = model
    if how == "ddp":
        net = DistributedDataParallel(model)
    if how == "fsdp2":
        for block in model.layers:
            fully_shard(block)
        fully_shard(model)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)

    def step():
        optimizer.step()
        optimizer.zero_grad()

    def data(number, n):
        return micro_batch(number, n * world + rank)

    losses = train(net, step, range(STEPS), 2 // world, data)
    saved = handle.state_dict()
    handle.load_state_dict(saved)
    verified = handle.verify()
    layers = list(handle.layers.values())
    masks = [layer.state.mask.clone() for layer in layers]
    packings = [layer.state.preparations for layer in layers]
    sharded = [isinstance(layer.weight, DTensor) for layer in layers]
    assert handle.finalize() == 4 and all(0.0 < one.density <= 0.5 for one in verified)
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return {
        "losses": losses,
        "masks": masks,
        "packings": packings,
        "sharded": sharded,
        "weights": [p.detach() for p in whole],
    }


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
@pytest.mark.parametrize("recipe", SETTINGS)
def test_two_ranks_are_one(recipe, how):
    (one,) = dist.run(_trained, 1, recipe, "plain")
    ranks = dist.run(_trained, 2, recipe, how)
    for rank in ranks:
        assert rank["packings"] == [STEPS] * 4  # once a step, whatever is gathered again
        assert rank["sharded"] == [how == "fsdp2"] * 4
        for mask, expected in zip(rank["masks"], one["masks"], strict=True):
            assert torch.equal(mask, expected)
        for weight, expected in zip(rank["weights"], one["weights"], strict=True):
            torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-5)
    mean = [sum(losses) / 2 for losses in zip(*(rank["losses"] for rank in ranks))]
    torch.testing.assert_close(mean, one["losses"], rtol=1e-5, atol=1e-6)


def _disagreeing(rank: int, world: int):
    from megasparse.errors import ReplicaError
    from megasparse.nn import sparsify_

    model = Model()
    handle = sparsify_(model, "ste", ["*.mlp.*"])
    model(micro_batch(0, 0))
    state = handle.layers["layers.1.mlp.linear_fc2"].state
    if rank == 1:
        state.mask[0, :4] = state.mask[0, :4].roll(1)
    try:
        handle.verify()
    except ReplicaError as error:
        return str(error)
    return None


def test_ranks_that_disagree_are_named():
    first, second = dist.run(_disagreeing, 2)
    assert first == "layers.1.mlp.linear_fc2: mask or scale of rank 1 is not rank 0's"
    assert second == "layers.1.mlp.linear_fc2: mask or scale of rank 0 is not rank 1's"


def _tensor_parallel(rank: int, world: int):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    from megasparse.errors import ConfigError
    from megasparse.nn import sparsify_

    model = Model()
    sparsify_(model, "ste", ["*.mlp.*"])
    mesh = init_device_mesh("cpu", (1,))
    parallelize_module(model.layers[0], mesh, {"mlp.linear_fc1": ColwiseParallel()})
    try:
        model(micro_batch(0, 0))
    except ConfigError as error:
        return str(error)
    return None


def test_tensor_parallel_weights_are_refused():
    (message,) = dist.run(_tensor_parallel, 1)
    assert message is not None and "layers.0.mlp.linear_fc1: the weight is sharded" in message
