"""What a linear keeps in Megatron's checkpoints: there and back, and beside a dense one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megasparse.megatron import layer_state
from megasparse.sparsity.recipe import make_recipe
from megasparse.sparsity.shard import WeightShard
from megasparse.sparsity.state import SparseWeight

WEIGHT = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))


def _linear(recipe: str | None, step: int | None = 4) -> Any:
    """A layer at step 9 of a run, whose state was last used at `step`; None: not yet."""
    state = None
    if recipe is not None:
        state = SparseWeight("w", make_recipe(recipe), WeightShard((8, 16)))
        if step is not None:
            state.effective_at(WEIGHT, step)
    steps: list[int] = []
    controller = SimpleNamespace(steps_done=9, set_steps_done=steps.append, told=steps)
    return SimpleNamespace(weight=WEIGHT, state=state, dense=None, controller=controller)


@pytest.mark.parametrize("recipe", ["fst", "ste", "s_ste"])
def test_what_is_taken_over_is_what_was_kept(recipe):
    linear, other = _linear(recipe), _linear(recipe, None)
    kept = layer_state.export(linear)
    assert set(kept) == {"sparsity_mask", "sparsity_numbers", "sparsity_scale"}
    assert kept["sparsity_mask"].dtype == torch.uint8 and kept["sparsity_mask"].shape == (8, 4)
    scaled = recipe == "s_ste"
    state = linear.state
    assert kept["sparsity_numbers"].tolist() == [
        state.last_refresh,
        state.refreshes,
        1,
        int(scaled),
        9,
    ]
    assert kept["sparsity_scale"].shape == (1,)
    names = {f"layer.{name}": value for name, value in kept.items()}
    loaded = {**names, "layer.weight": WEIGHT, "layer2.sparsity_mask": WEIGHT}
    layer_state.import_(other, layer_state.taken_from(loaded, "layer."))
    assert set(loaded) == {"layer.weight", "layer2.sparsity_mask"}
    assert other.controller.told == [9]
    assert (other.state.last_refresh, other.state.refreshes) == (
        state.last_refresh,
        state.refreshes,
    )
    assert torch.equal(other.state.mask, state.mask)
    assert other.state.mask_transposable == (recipe == "fst")
    used = [one.state.effective_at(WEIGHT, 4) for one in (linear, other)]
    assert torch.equal(*used)
    if not scaled:
        assert other.state.scale is None
        return
    kept["sparsity_scale"] += 1  # is no part of either
    assert torch.equal(other.state.scale, state.scale)


@pytest.mark.parametrize("recipe", ["fst", "s_ste"])
def test_all_names_are_there_before_the_first_step(recipe):
    kept = layer_state.export(_linear(recipe, None))
    assert not kept["sparsity_mask"].any() and kept["sparsity_mask"].shape == (8, 4)
    assert kept["sparsity_numbers"].tolist() == [-1, 0, 0, 0, 9]
    assert kept["sparsity_scale"].tolist() == [0.0]
    other = _linear(recipe)
    layer_state.import_(other, {name[len("sparsity_") :]: v for name, v in kept.items()})
    assert other.state.mask is other.state.scale is None and other.controller.told == [9]


def test_a_dense_checkpoint_leaves_the_state_and_its_operands_are_made_anew():
    linear = _linear("fst")
    mask = linear.state.mask.clone()
    invalid: list[int] = []
    linear.state.invalidate = lambda: invalid.append(1)
    layer_state.import_(linear, {})
    assert torch.equal(linear.state.mask, mask) and linear.controller.told == []
    assert invalid == [1]


class Dense:
    """Stands for the FP8 operands of a dense weight."""

    def __init__(self) -> None:
        self.loaded: list[Any] = []
        self.quantizers = SimpleNamespace(export_state=lambda: {"fp8_scale": torch.ones(2)})

    def import_state(self, kept: dict[str, torch.Tensor]) -> None:
        self.loaded.append(kept)


def test_a_dense_layer_in_fp8_keeps_its_scales():
    linear = _linear(None)
    assert layer_state.export(linear) == {}
    layer_state.import_(linear, {"fp8_scale": WEIGHT})  # which nobody wants
    linear.dense = Dense()
    assert list(layer_state.export(linear)) == ["sparsity_fp8_scale"]
    layer_state.import_(linear, {})
    assert linear.dense.loaded == []
    layer_state.import_(linear, {"fp8_scale": WEIGHT})
    assert linear.dense.loaded == [{"fp8_scale": WEIGHT}] and linear.controller.told == []


def test_scales_of_a_sparse_layer_go_with_its_mask():
    linear = _linear("fst")
    linear.state.quantizers = SimpleNamespace(
        export_state=lambda: {"fp8_scale": torch.ones(2)},
        import_state=lambda state: taken.update(state),
    )
    taken: dict[str, torch.Tensor] = {}
    kept = layer_state.taken_from(layer_state.export(linear), "")
    assert "fp8_scale" in kept
    layer_state.import_(linear, kept)
    assert set(taken) == {"counters", "mask", "fp8_scale"}
