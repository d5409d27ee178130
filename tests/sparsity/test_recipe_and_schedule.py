"""Recipes are frozen and validated; schedules are pure functions of the step."""

from __future__ import annotations

import dataclasses

import pytest

from megasparse.errors import ConfigError
from megasparse.sparsity import schedule
from megasparse.sparsity.recipe import PRESETS, SparsityRecipe, make_recipe


def test_presets_name_their_sparse_gemms():
    gemms = {name: recipe.sparse_gemms for name, recipe in PRESETS.items()}
    assert gemms == {
        "dense": (),
        "ste": ("output",),
        "sr_ste": ("output",),
        "fst": ("output", "grad_input", "grad_weight"),
        "s_ste": ("output", "grad_weight"),
        "ast": ("output",),
    }
    with pytest.raises(dataclasses.FrozenInstanceError):
        PRESETS["fst"].masked_decay = 0.0  # type: ignore[misc]


def test_overrides_apply_and_useless_ones_are_refused():
    recipe = make_recipe("fst", masked_decay=1e-3, mvue=None)
    assert recipe.masked_decay == 1e-3 and recipe.mvue == PRESETS["fst"].mvue
    with pytest.raises(ConfigError, match="s_ste has no decay"):
        make_recipe("s_ste", masked_decay=1e-3)
    with pytest.raises(ConfigError, match="no sparse GEMM"):
        make_recipe("dense", mvue="exact")
    with pytest.raises(ConfigError, match="expected one of dense, ste"):
        make_recipe("fst2")
    with pytest.raises(ConfigError, match="needs a mask"):
        SparsityRecipe("x", projection="soft_threshold", regulariser="masked_decay")


def test_dense_warmup_and_tail_bound_the_sparse_range():
    recipe = make_recipe("fst", dense_warmup_fraction=0.1, dense_tail_fraction=1 / 6)
    sparse = [step for step in range(300) if schedule.is_sparse_step(recipe, step, 300)]
    assert sparse == list(range(30, 250))
    assert not schedule.is_sparse_step(recipe, 300, 300)  # after the end: as in the last step
    assert schedule.is_sparse_step(make_recipe("s_ste"), 300, 300)
    assert not any(schedule.is_sparse_step(PRESETS["dense"], s, 10) for s in range(11))


def test_decay_acts_in_the_sparse_range_only_and_ramps():
    fst = make_recipe("fst", dense_tail_fraction=0.5)
    assert [schedule.masked_decay(fst, s, 4) for s in range(4)] == [6e-5, 6e-5, 0.0, 0.0]
    ast = make_recipe("ast", masked_decay=1.0, masked_decay_ramp_iters=4)
    assert [schedule.masked_decay(ast, s, 9) for s in range(7)] == [0, 0.25, 0.5, 0.75, 1, 1, 1]


@pytest.mark.parametrize("interval", [1, 3, 40])
def test_refreshes_fall_on_multiples_however_often_it_is_asked(interval):
    recipe = make_recipe("fst", mask_update_interval=interval)
    last, refreshed = -1, []
    for step in range(100):
        for _ in range(3):  # training, evaluation, a resume: asking again changes nothing
            if schedule.refresh_due(recipe, step, last):
                refreshed.append(step)
                last = step
    assert refreshed == list(range(0, 100, interval))
