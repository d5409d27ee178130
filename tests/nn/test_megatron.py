"""The same weights and data give the bits of Megatron's path: losses, masks, draws, weights."""

from __future__ import annotations

import pytest
import torch

from tests import dist
from tests.nn.models import Model, loss_of, micro_batch, stepper, train

STEPS = 7
SETTINGS: dict[str, dict] = {
    "fst": {"masked_decay": 1e-2, "mask_update_interval": 2, "dense_tail_fraction": 0.3},
    "s_ste": {"dense_warmup_fraction": 0.2},
    "sr_ste": {"masked_decay": 1e-2},
    "ast": {"masked_decay": 1e-2, "masked_decay_ramp_iters": 4, "mask_update_interval": 2},
}


def _by_megatron(rank: int, world: int, recipe_name: str):
    """A model of ParallelLinears, trained by hand as `docs/spec_provider.md` does."""
    from types import SimpleNamespace

    from megasparse.kernels import masked_decay_
    from megasparse.megatron.grid import make_grid
    from megasparse.megatron.parallel_linear import (
        SparseColumnParallelLinear,
        SparseRowParallelLinear,
    )
    from megasparse.megatron.sparsify import sparsify
    from megasparse.optim.adamw import MaskedAdamW
    from megasparse.optim.masked_decay import Piece
    from megasparse.sparsity.clock import Clock
    from megasparse.sparsity.recipe import make_recipe

    make_grid(1, torch.device("cpu"), seed=1)
    config = SimpleNamespace(
        sequence_parallel=False, use_cpu_initialization=True, params_dtype=torch.float32
    )
    model = Model()
    for block in model.layers:
        for name, kind in (
            ("linear_fc1", SparseColumnParallelLinear),
            ("linear_fc2", SparseRowParallelLinear),
        ):
            dense = getattr(block.mlp, name)
            made = kind(dense.in_features, dense.out_features, config=config)
            made.load_state_dict(dense.state_dict())
            setattr(block.mlp, name, made)
            made.register_forward_hook(lambda _, __, output: output[0])
    clock = Clock(seed=5, train_iters=STEPS)
    controller = sparsify(model, make_recipe(recipe_name, **SETTINGS[recipe_name]), clock)

    def pieces(tensor):
        masks = {id(weight): mask for weight, mask in controller.masked_weights()}
        mask = masks.get(id(tensor))
        return [Piece(0, tensor.numel(), None if mask is None else mask.view(-1))]

    decoupled = recipe_name == "ast"
    options = {"lr": 3e-3, "weight_decay": 0.1}
    if decoupled:
        optimizer = MaskedAdamW(model.parameters(), lambda _: True, pieces, True, **options)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), foreach=False, **options)
    losses = []
    for number in range(STEPS):
        clock.step, total = number, 0.0
        for n in range(2):
            clock.micro_batch = n
            loss = loss_of(model, micro_batch(number, n)) / 2
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if decoupled:
            optimizer.decay = controller.masked_decay()
        else:
            for weight, mask in controller.masked_weights():
                masked_decay_(weight.grad, weight.data, mask, controller.masked_decay())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    masks = {state.name: state.mask for state, _ in controller.weights}
    scales = {state.name: state.scale for state, _ in controller.weights}
    return losses, masks, scales, {n: p.detach() for n, p in model.named_parameters()}


@pytest.mark.parametrize("recipe", SETTINGS)
def test_bits_are_those_of_megatrons_path(recipe):
    from megasparse.nn import sparsify_

    ((losses, masks, scales, weights),) = dist.run(_by_megatron, 1, recipe)
    model = Model()
    handle = sparsify_(
        model, recipe, ["*.mlp.linear_fc*"], train_iters=STEPS, seed=5, **SETTINGS[recipe]
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1, foreach=False)
    assert train(model, stepper(model, optimizer), range(STEPS)) == losses
    assert len(handle.layers) == 4
    for name, layer in handle.layers.items():
        assert torch.equal(layer.state.mask, masks[f"{name}.weight"]), name
        assert layer.state.scale == scales[f"{name}.weight"]
    for name, weight in model.named_parameters():
        assert torch.equal(weight, weights[name]), name
