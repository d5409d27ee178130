"""A sparse weight's life: refreshed when due, prepared once a step, restored exactly."""

from __future__ import annotations

import pytest
import torch

from megasparse.errors import CheckpointError, ConfigError, NumericsError
from megasparse.kernels import is_24, s_ste_scale, soft_threshold24, transposable24_mask
from megasparse.sparsity.clock import Clock
from megasparse.sparsity.controller import SparsityController
from megasparse.sparsity.recipe import make_recipe
from megasparse.sparsity.shard import WeightShard
from megasparse.sparsity.state import SparseWeight
from megasparse.sparsity.stats import measure


def _state(recipe="fst", shape=(8, 12), **overrides):
    return SparseWeight("w", make_recipe(recipe, **overrides), WeightShard(shape))


def test_operands_are_built_once_a_step_from_the_current_weight_with_the_old_mask():
    state = _state(mask_update_interval=4)
    weight = torch.randn(8, 12)
    for step in range(8):
        for _ in range(3):  # micro-batches
            gemms = state.gemms(weight, step, sparse=True, monitor=True)
        expected = weight * transposable24_mask(weight) if step % 4 == 0 else weight * state.mask
        assert torch.equal(gemms.output(torch.eye(12)).t(), expected)
        weight = weight + 0.3 * torch.randn(8, 12)
    assert state.preparations == 8 and state.refreshes == 2


def test_flips_are_counted_between_refreshes():
    state = _state(mask_update_interval=1)
    first, second = torch.randn(8, 12), torch.randn(8, 12)
    state.gemms(first, 0, True, True)
    assert state.flips is None
    state.gemms(second, 1, True, True)
    naive = sum(
        int(a != b)
        for a, b in zip(
            transposable24_mask(first).flatten().tolist(),
            transposable24_mask(second).flatten().tolist(),
            strict=True,
        )
    )
    assert int(state.flips) == naive > 0


@pytest.mark.parametrize("recipe", ["ste", "sr_ste", "fst", "s_ste", "ast"])
def test_effective_weight_is_24(recipe):
    state = _state(recipe)
    weight = torch.randn(8, 12)
    state.gemms(weight, 0, True, True)
    effective = state.effective(weight)
    assert is_24(effective)
    assert is_24(effective, dim=0) == (recipe == "fst")


def test_dense_phase_multiplies_with_the_whole_weight_and_monitors():
    state = _state()
    weight = torch.randn(8, 12)
    gemms = state.gemms(weight, 0, sparse=False, monitor=True)
    assert torch.equal(gemms.output(torch.eye(12)).t(), weight) and state.mask is not None
    silent = _state()
    silent.gemms(weight, 0, sparse=False, monitor=False)
    assert silent.mask is None


def test_s_ste_scale_is_frozen_and_summed_over_shards():
    whole = torch.randn(16, 12)
    single = _state("s_ste", (16, 12))
    single.gemms(whole, 0, True, True)
    scale = float(single.scale)
    single.gemms(whole * 3 + 1, 1, True, True)
    assert float(single.scale) == scale
    # Two shards, each of which adds the other's part of the two dot products.
    sums = []
    for rank in range(2):
        shard = SparseWeight("w", make_recipe("s_ste"), WeightShard((16, 12), 0, rank, 2))
        shard._reduce = lambda t: sums.append(t.clone()) or t
        shard.gemms(shard.shard.slice_of(whole), 0, True, True)
    reduced = SparseWeight(
        "w", make_recipe("s_ste"), WeightShard((16, 12), 0, 0, 2), lambda t: t + sums[1]
    )
    reduced.gemms(reduced.shard.slice_of(whole), 0, True, True)
    assert float(reduced.scale) == pytest.approx(scale, rel=1e-6)


def test_s_ste_scale_of_every_step_is_that_of_the_weight():
    state, reduced = _state("s_ste", s_ste_scale="every_step"), []
    state._reduce = lambda sums: reduced.append(1) or sums
    weight = torch.randn(8, 12)
    for step in range(3):
        for _ in range(2):  # micro-batches
            gemms = state.gemms(weight, step, True, True)
            assert torch.equal(gemms.output(torch.eye(12)).t(), state.effective(weight))
        projected = soft_threshold24(weight)
        # beta is the least-squares fit: what is left is orthogonal to S(W).
        left = weight - state.scale * projected
        assert float((left * projected).sum()) == pytest.approx(0.0, abs=1e-4)
        assert len(reduced) == step + 1  # ranks of a shard meet once a step
        weight = 2 * weight + torch.randn(8, 12)
    # A checkpoint is read with the scale of its weight, whatever was stored.
    other = _state("s_ste", s_ste_scale="every_step")
    other.import_state(state.export_state(), torch.device("cpu"))
    assert torch.equal(other.effective_at(weight, 3), state.effective_at(weight, 3))
    assert float(other.scale) == float(s_ste_scale(weight))
    for name in ("fst", "ste", "dense"):
        with pytest.raises(ConfigError, match=f"s_ste_scale every_step: the recipe {name} has no"):
            make_recipe(name, s_ste_scale="every_step")
    assert make_recipe("s_ste").s_ste_scale == "frozen"


def test_a_model_cast_does_not_round_the_scale():
    state = _state("s_ste")
    state.gemms(torch.randn(8, 12), 0, True, True)
    before = state.scale.clone()
    state.bfloat16()
    assert state.scale.dtype == torch.float32 and torch.equal(state.scale, before)


@pytest.mark.parametrize("recipe", ["ste", "fst", "s_ste"])
def test_export_and_import_restore_everything(recipe):
    state = _state(recipe, mask_update_interval=2)
    weight = torch.randn(8, 12)
    for step in range(3):
        state.gemms(weight, step, True, True)
        weight = weight + torch.randn(8, 12)
    other = _state(recipe, mask_update_interval=2)
    other.import_state(state.export_state(), torch.device("cpu"))
    for step in (3, 4):
        a = state.gemms(weight, step, True, True).output(torch.eye(12))
        b = other.gemms(weight, step, True, True).output(torch.eye(12))
        assert torch.equal(a, b)
    assert other.refreshes == state.refreshes and torch.equal(other.flips, state.flips)
    assert torch.equal(other.mask, state.mask)


def test_damaged_state_is_refused():
    with pytest.raises(CheckpointError, match="counters of shape"):
        _state().import_state({"counters": torch.zeros(3)}, torch.device("cpu"))


def test_nan_in_a_weight_is_never_pruned_silently():
    weight = torch.randn(8, 12)
    weight[3, 5] = float("nan")
    with pytest.raises(NumericsError):
        _state().gemms(weight, 0, True, True)


def test_controller_reports_and_seeds():
    controller = SparsityController(make_recipe("fst"), Clock(seed=1, train_iters=60))
    state, weight = _state(), torch.nn.Parameter(torch.randn(8, 12))
    assert controller.register(state, weight, 7) == 0
    state.gemms(weight, 0, True, True)
    measured = measure(controller.weights, True, torch.device("cpu"), controller.dense)
    assert measured.flips_known == [False]
    assert measured.weight_sums[0, 1:3].tolist() == [48, 96]
    clock = controller.clock
    seeds = set()
    for clock.step in range(3):
        for clock.micro_batch in range(3):
            seeds |= {clock.mvue_seed(layer) for layer in range(3)}
    assert len(seeds) == 27
    assert controller.seed(0) == clock.mvue_seed(7)
    clock.step = 55  # in the dense tail
    measured = measure(
        controller.weights, controller.sparse_now, torch.device("cpu"), controller.dense
    )
    assert measured.weight_sums[0, 1] == 96 and controller.masked_decay() == 0.0


def test_imported_state_is_what_the_next_gemm_multiplies_with():
    """Also within the step that operands were made for before."""
    generator = torch.Generator().manual_seed(0)
    weight, other = (torch.randn(8, 16, generator=generator) for _ in range(2))
    source, state = _state("ste", (8, 16)), _state("ste", (8, 16))
    source.gemms(other, 0, True, True)
    state.gemms(weight, 0, True, True)
    assert not torch.equal(source.mask, state.mask)
    state.import_state(source.export_state(), torch.device("cpu"))
    x = torch.eye(16)
    found = state.gemms(weight, 0, True, True).output(x)
    torch.testing.assert_close(found, (weight * source.mask).t())


@pytest.mark.parametrize("recipe", ["ste", "fst", "s_ste"])
@pytest.mark.parametrize("refreshes", [1, 2, 3, 4])
def test_a_skipped_step_leaves_masks_flips_and_counters(recipe, refreshes):
    """Whether it was the first refresh, the first with flips, or a later one."""
    generator = torch.Generator().manual_seed(refreshes)
    weights = [torch.randn(8, 16, generator=generator) for _ in range(refreshes + 1)]
    state = _state(recipe, (8, 16), mask_update_interval=1)
    for step in range(refreshes - 1):
        state.gemms(weights[step], step, True, True)
    before = {name: value.clone() for name, value in state.export_state().items()}
    snapshot = state.snapshot()
    state.gemms(weights[-1], refreshes - 1, True, True)  # is skipped
    assert state.refreshes == refreshes
    state.restore(snapshot)
    after = state.export_state()
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value), name
    # And the step that is computed in its place is as if it had not been.
    other = _state(recipe, (8, 16), mask_update_interval=1)
    for step in range(refreshes):
        a = state.gemms(weights[step], step, True, True) if step == refreshes - 1 else None
        b = other.gemms(weights[step], step, True, True)
    assert torch.equal(a.output(torch.eye(16)), b.output(torch.eye(16)))
    for name, value in other.export_state().items():
        assert torch.equal(state.export_state()[name], value), name
    assert state.preparations == other.preparations


@pytest.mark.parametrize(
    ("more", "expected"), [({}, [0, 0, 1, 1]), ({"mask_metric": "wanda"}, [0] * 4)]
)
def test_a_refresh_can_be_captured_once_all_that_it_writes_is_there(more, expected):
    """Mask, flips and what was before: from the third on, at the same addresses. Norms of inputs,
    which Wanda multiplies with, are new tensors after every step."""
    state = _state("ste", (8, 16), mask_update_interval=1, **more)
    found, places = [], []
    for step in range(4):
        found.append(state.refreshes_in_place)
        state.gemms(torch.randn(8, 16), step, True, True)
        places.append((state.mask.data_ptr(), state.flips is not None and state.flips.data_ptr()))
    assert found == expected
    assert len({mask for mask, _ in places}) == 1 and len({flips for _, flips in places[1:]}) == 1
    fresh = _state("ste", (8, 16), mask_update_interval=1, **more)
    fresh.import_state(state.export_state(), torch.device("cpu"))
    assert not fresh.refreshes_in_place
