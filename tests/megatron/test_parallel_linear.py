"""Sharded == unsharded: a pair of parallel linears against one rank, gradients too."""

from __future__ import annotations

import pytest
import torch

from tests import dist

S, B, H, F = 8, 2, 16, 32  # sequence, batch, hidden, FFN


def _ffn(rank, world, recipe_name, sequence_parallel, gated):
    """One FFN (column, then row), forward and backward, on this rank; whole results on rank 0."""
    from types import SimpleNamespace

    from megasparse.megatron.grid import make_grid
    from megasparse.megatron.init import initialize_weights, parameter_shard
    from megasparse.megatron.parallel_linear import (
        SparseColumnParallelLinear,
        SparseRowParallelLinear,
    )
    from megasparse.megatron.sparsify import sparsify
    from megasparse.sparsity.clock import Clock
    from megasparse.sparsity.recipe import make_recipe

    grid = make_grid(world, torch.device("cpu"), seed=1)
    config = SimpleNamespace(
        sequence_parallel=sequence_parallel,
        use_cpu_initialization=True,
        params_dtype=torch.float32,
    )
    model = torch.nn.ModuleDict(
        {
            "linear_fc1": SparseColumnParallelLinear(
                H, F * (2 if gated else 1), config=config, stride=2 if gated else 1
            ),
            "linear_fc2": SparseRowParallelLinear(F, H, config=config),
        }
    )
    initialize_weights(model, 3, 0.5, 1, grid.tp_rank, grid.tp_size)
    clock = Clock(seed=5, train_iters=10)
    recipe = make_recipe(recipe_name, sparse_layers=("linear_*",))
    sparsify(model, recipe, clock, grid.sum_over_tp)
    generator = torch.Generator().manual_seed(9)
    x_whole = torch.randn(S, B, H, generator=generator)
    dz_whole = torch.randn(S, B, H, generator=generator)
    part = slice(rank * S // world, (rank + 1) * S // world) if sequence_parallel else slice(None)
    x = x_whole[part].clone().requires_grad_()
    hidden, _ = model["linear_fc1"](x)
    if gated:
        gate, up = hidden.chunk(2, -1)
        hidden = torch.nn.functional.silu(gate) * up
    z, _ = model["linear_fc2"](hidden)
    z.backward(dz_whole[part])
    results = {}
    for name, parameter in model.named_parameters():
        shard = parameter_shard(parameter, grid.tp_rank, grid.tp_size)
        gradient = parameter.grad
        if getattr(parameter, "sequence_parallel", False):
            gradient = grid.sum_over_tp(gradient.clone())
        results[name] = (shard, gradient)
    masks = {
        name: (module.shard, module.state.mask)
        for name, module in model.items()
        if module.state is not None and module.state.mask is not None
    }
    return {"z": z.detach(), "dx": x.grad, "grads": results, "masks": masks}


def _assemble(ranks, group, name):
    shards = [rank[group][name] for rank in ranks]
    whole = torch.empty(shards[0][0].global_shape, dtype=shards[0][1].dtype)
    for shard, value in shards:
        shard.write_into(whole, value)
    return whole


@pytest.mark.parametrize("gated", [False, True], ids=["gelu", "gated"])
@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tp", "tp-sp"])
@pytest.mark.parametrize("recipe", ["dense", "ste", "fst", "s_ste"])
def test_two_ranks_equal_one(recipe, sequence_parallel, gated):
    (single,) = dist.run(_ffn, 1, recipe, False, gated)
    ranks = dist.run(_ffn, 2, recipe, sequence_parallel, gated)
    tolerance = {"rtol": 1e-5, "atol": 1e-5}
    for key in ("z", "dx"):
        if sequence_parallel:
            torch.testing.assert_close(
                torch.cat([rank[key] for rank in ranks]), single[key], **tolerance
            )
        else:
            for rank in ranks:
                torch.testing.assert_close(rank[key], single[key], **tolerance)
    for name, (_, gradient) in single["grads"].items():
        torch.testing.assert_close(_assemble(ranks, "grads", name), gradient, **tolerance)
    for name, (_, mask) in single["masks"].items():
        assert torch.equal(_assemble(ranks, "masks", name), mask)


def _bad_patterns(rank, world):
    from types import SimpleNamespace

    from megasparse.errors import ConfigError
    from megasparse.megatron.grid import make_grid
    from megasparse.megatron.parallel_linear import SparseColumnParallelLinear
    from megasparse.megatron.sparsify import sparsify
    from megasparse.sparsity.clock import Clock
    from megasparse.sparsity.recipe import make_recipe

    make_grid(1, torch.device("cpu"), seed=1)
    config = SimpleNamespace(
        sequence_parallel=False, use_cpu_initialization=True, params_dtype=torch.float32
    )
    model = torch.nn.ModuleDict({"linear_fc1": SparseColumnParallelLinear(6, 8, config=config)})
    messages = []
    for patterns in (["*.linear_fc3"], ["linear_fc1"]):
        try:
            sparsify(model, make_recipe("fst", sparse_layers=patterns), Clock(0, 1))
        except ConfigError as error:
            messages.append(str(error))
    assert "dense" in repr(model["linear_fc1"])
    # 16 rows in two fused parts of 8, and 12 in two of 6, which the blocks of 4 do not fill.
    for rows in (16, 12):
        fused = SparseColumnParallelLinear(8, rows, config=config, stride=2)
        try:
            recipe = make_recipe("fst", sparse_layers=["linear_fc1"])
            sparsify(torch.nn.ModuleDict({"linear_fc1": fused}), recipe, Clock(0, 1))
        except ConfigError as error:
            messages.append(str(error))
    return messages


def test_patterns_that_match_nothing_and_cut_blocks_are_refused():
    (messages,) = dist.run(_bad_patterns, 1)
    assert "no linear is named like '*.linear_fc3'" in messages[0]
    assert "linear_fc1: a shard of 8 x 6" in messages[1]
    assert "a shard of 12 x 8" in messages[2] and "2 fused parts" in messages[2]
    assert len(messages) == 3


def _observed(rank, world):
    """Tokens that Wanda's norms have seen after each of several passes."""
    from types import SimpleNamespace

    from megasparse.megatron.grid import make_grid
    from megasparse.megatron.parallel_linear import SparseColumnParallelLinear
    from megasparse.megatron.sparsify import sparsify
    from megasparse.sparsity.clock import Clock
    from megasparse.sparsity.recipe import make_recipe
    from megasparse.sparsity.wanda import finish_step

    make_grid(1, torch.device("cpu"), seed=1)
    config = SimpleNamespace(
        sequence_parallel=False, use_cpu_initialization=True, params_dtype=torch.float32
    )
    layer = SparseColumnParallelLinear(8, 8, config=config)
    torch.nn.init.normal_(layer.weight)
    recipe = make_recipe("ast", mask_metric="wanda", sparse_layers=("layer",))
    controller = sparsify(torch.nn.ModuleDict({"layer": layer}), recipe, Clock(0, 9))
    seen = []

    def run(training, gradients, calibrating):
        layer.train(training)
        controller.calibrating = calibrating
        with torch.set_grad_enabled(gradients):
            layer(torch.randn(3, 2, 8))
        finish_step([(layer.state.inputs, False)], lambda t: t, lambda t: t)
        seen.append(layer.state.inputs.tokens)

    run(False, False, False)  # an evaluation
    run(False, True, False)  # one with gradients
    run(True, False, False)  # the first pass of a layer that is recomputed
    run(True, True, False)
    run(False, False, False)
    run(False, False, True)
    return seen


def test_inputs_are_observed_in_training_and_calibration_alone():
    assert dist.run(_observed, 1) == [[0, 0, 0, 6, 6, 12]]


def _singleton(rank, world):
    from types import SimpleNamespace

    from megasparse.megatron import layer_state
    from megasparse.megatron.grid import make_grid
    from megasparse.megatron.parallel_linear import SparseColumnParallelLinear
    from megasparse.megatron.sparsify import sparsify
    from megasparse.sparsity.clock import Clock
    from megasparse.sparsity.recipe import make_recipe

    grid = make_grid(world, torch.device("cpu"), seed=1)
    config = SimpleNamespace(
        sequence_parallel=False, use_cpu_initialization=True, params_dtype=torch.float32
    )
    model = torch.nn.ModuleDict(
        {"linear_fc1": SparseColumnParallelLinear(H, 2 * F, config=config, stride=2)}
    )
    torch.nn.init.normal_(model["linear_fc1"].weight)
    recipe = make_recipe("ste", sparse_layers=("linear_*",))
    sparsify(model, recipe, Clock(seed=5, train_iters=10), grid.sum_over_tp)
    model["linear_fc1"](torch.ones(1, 1, H))
    asked = []
    layer_state.apply_swiglu_sharded_factory = lambda made, offsets, singleton: asked.append(
        singleton
    )
    for metadata in (None, {}, {"singleton_local_shards": True}):
        made = model["linear_fc1"].sharded_state_dict("fc1.", (), metadata)
    return asked, sorted(made)


def test_gate_and_up_of_a_mask_are_sharded_as_the_checkpoint_asks():
    asked, names = dist.run(_singleton, 1)[0]
    assert asked == [False, False, True] and "fc1.weight" in names
