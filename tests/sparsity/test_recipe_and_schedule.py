"""Recipes are frozen and validated; schedules are pure functions of the step."""

from __future__ import annotations

import dataclasses
from dataclasses import fields
from typing import get_args

import pytest

from megasparse.config import RunConfig, SparsityConfig, load_config
from megasparse.config.schema.sparsity import RecipeName
from megasparse.errors import ConfigError
from megasparse.sparsity import schedule
from megasparse.sparsity.recipe import PRESETS, SparsityRecipe, make_recipe, recipe_with
from megasparse.sparsity.run_recipe import recipe_of


def test_presets_name_their_sparse_gemms():
    gemms = {name: recipe.sparse_gemms for name, recipe in PRESETS.items()}
    assert gemms == {
        "dense": (),
        "ste": ("output",),
        "sr_ste": ("output",),
        "fst": ("output", "grad_input", "grad_weight"),
        "fst_relaxed": ("output", "grad_input", "grad_weight"),
        "s_ste": ("output", "grad_weight"),
        "s_ste_3": ("output", "grad_input", "grad_weight"),
        "ast": ("output",),
        "cast": (),  # trained densely
    }
    for name in ("ste", "sr_ste", "ast", "s_ste"):
        recipe = make_recipe(name, sparse_grad_input="double-pruned")
        assert {"output", "grad_input"} <= set(recipe.sparse_gemms) and not recipe.transposable
    assert make_recipe("s_ste_3", sparse_grad_input="exact").sparse_gemms == gemms["s_ste"]
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


def test_groups_of_mvue():
    assert not make_recipe("fst").strided_groups  # the default stays
    assert make_recipe("s_ste", mvue_groups="strided").strided_groups
    assert not make_recipe("sr_ste", mvue_groups="neighbours").strided_groups
    with pytest.raises(
        ConfigError, match="recipe sr_ste: mvue_groups strided, but with mvue off nothing"
    ):
        make_recipe("sr_ste", mvue_groups="strided")
    with pytest.raises(ConfigError, match="expected neighbours or strided"):
        make_recipe("fst", mvue_groups="auto")


@pytest.mark.parametrize(
    ("recipe", "micro_batch", "groups"),
    [
        ("fst", 1, "strided"),
        ("fst", 2, "strided"),
        ("s_ste", 4, "neighbours"),
        ("s_ste", 8, "neighbours"),
        ("ast", 1, "neighbours"),  # draws nothing
    ],
)
def test_automatic_groups_follow_the_micro_batch(recipe, micro_batch, groups):
    flags = ["--mock-data", "--sparsity-recipe", recipe, "--mvue-groups", "auto"]
    flags += ["--micro-batch-size", str(micro_batch), "--global-batch-size", "8"]
    assert recipe_of(load_config(flags)).mvue_groups == groups


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
    cast = make_recipe("cast", masked_decay=2.0, dense_warmup_fraction=0.2)
    assert [schedule.masked_decay(cast, s, 5) for s in range(5)] == [0, 0, 0.5, 1.0, 1.5]


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


@pytest.mark.parametrize("monitored", [True, False])
def test_the_first_sparse_step_has_a_mask_of_its_own(monitored):
    recipe = make_recipe("fst", mask_update_interval=10)
    last, refreshed = -1, []
    for step in range(0 if monitored else 25, 45):
        if schedule.refresh_due(recipe, step, last, first_sparse_step=25):
            refreshed.append(step)
            last = step
    assert [step for step in refreshed if step >= 25] == [25, 30, 40]


def test_the_names_of_the_configuration_are_the_presets():
    assert get_args(RecipeName) == tuple(PRESETS)


def test_which_linears_are_sparse_is_asked_of_the_recipe():
    recipe = make_recipe("ste", sparse_layers=("*.mlp.linear_fc1", "decoder.layers.0.*"))
    assert recipe.matches("decoder.layers.3.mlp.linear_fc1")
    assert recipe.matches("decoder.layers.0.self_attention.linear_qkv")
    assert not recipe.matches("decoder.layers.3.mlp.linear_fc2")
    assert recipe.unmatched(["decoder.layers.0.mlp.linear_fc2"]) == ["*.mlp.linear_fc1"]
    assert not make_recipe("dense").matches("decoder.layers.0.mlp.linear_fc1")


def test_a_setting_of_the_run_reaches_the_recipe_by_its_name():
    """Whatever field both have: nothing is copied by hand."""
    config = RunConfig()
    config.sparsity = SparsityConfig(
        sparsity_recipe="ast",
        sparse_layers=["a"],
        sparse_grad_input="double-pruned",
        mask_update_interval=7,
        freeze_masks=True,
        masked_decay=0.5,
        masked_decay_ramp_iters=3,
        mvue="approximate",
        mvue_groups="strided",
        masked_decay_update_interval=20,
        weight_scale_groups=0,
        operand_packing="auto",
        mask_metric="wanda",
        simulate_fp8=True,
        s_ste_scale="frozen",
        dense_warmup_fraction=0.25,
        dense_tail_fraction=0.125,
    )
    recipe = recipe_of(config)
    both = {f.name for f in fields(SparsityRecipe)} & {f.name for f in fields(SparsityConfig)}
    assert {"masked_decay", "mvue", "mask_metric", "sparse_layers"} < both
    for name in both - {"sparse_layers"}:
        assert getattr(recipe, name) == getattr(config.sparsity, name), name
    assert recipe.sparse_layers == ("a",)
    assert recipe_of(RunConfig()) == PRESETS["dense"]


@pytest.mark.parametrize(
    ("recipe", "flags", "message"),
    [
        ("fst", {"slorb_k": 16}, "recipe fst, expected a row-wise mask: ste, sr_ste or ast"),
        ("s_ste", {"mask_metric": "wanda"}, "expected row-wise masks: ste, sr_ste, ast or cast"),
        ("ste", {"s_ste_scale": "every_step"}, "expected s_ste or s_ste_3"),
        ("fst", {"sparse_grad_input": "double-pruned"}, "by rows alone: ste, sr_ste, s_ste, s_st"),
        ("dense", {"sparse_grad_input": "double-pruned"}, "by rows alone: ste"),
        ("ast", {"masked_decay_before_clipping": True}, "expected sr_ste, fst or fst_relaxed"),
    ],
)
def test_what_a_recipe_has_no_use_for(recipe, flags, message):
    words = [word for name, value in flags.items() for word in _flag(name, value)]
    config = load_config(["--sparsity-recipe", recipe, *words])
    with pytest.raises(ConfigError, match=message):
        recipe_of(config)


def _flag(name, value):
    flag = "--" + name.replace("_", "-")
    return [flag] if value is True else [flag, str(value)]


def test_constants_of_the_presets_are_those_of_the_papers():
    def of(name):
        recipe = PRESETS[name]
        defaults = recipe.masked_decay_update_interval, recipe.weight_scale_groups
        assert defaults == (100, 2 if name == "cast" else 0)
        assert not (recipe.freeze_masks or recipe.masked_decay_before_clipping)
        assert recipe.dense_forward == (name == "cast") and not recipe.simulate_fp8
        return (
            recipe.projection,
            recipe.mvue,
            recipe.regulariser,
            recipe.masked_decay,
            recipe.masked_decay_ramp_iters,
            recipe.mask_update_interval,
            recipe.dense_warmup_fraction,
            recipe.dense_tail_fraction,
        )

    assert {name: of(name) for name in PRESETS} == {
        "dense": ("none", "off", "none", 0.0, 0, 1, 0.0, 0.0),
        "ste": ("row", "off", "none", 0.0, 0, 1, 0.0, 0.0),
        "sr_ste": ("row", "off", "masked_decay", 2e-4, 0, 1, 0.0, 0.0),
        "fst": ("transposable", "exact", "masked_decay", 6e-5, 0, 1, 0.0, 1 / 6),
        "fst_relaxed": ("transposable", "exact", "masked_decay", 6e-5, 0, 1, 0.0, 0.0),
        "s_ste": ("soft_threshold", "exact", "none", 0.0, 0, 1, 0.0, 0.0),
        "s_ste_3": ("soft_threshold", "exact", "none", 0.0, 0, 1, 0.0, 0.0),
        "ast": ("row", "off", "decoupled_masked_decay", 1e-4, 10_000, 10, 0.0, 0.0),
        "cast": ("row", "off", "masked_l1_decay", 4e-7, 0, 10, 0.0, 0.0),
    }


def test_what_a_weight_keeps_is_said():
    mask = ("mask", "counters", "flips")
    assert PRESETS["dense"].state == () and PRESETS["fst"].state == mask
    assert PRESETS["s_ste"].state == ("scale", *mask)
    assert make_recipe("fst", masked_decay_rho=0.05).state == (*mask, "decay", "decay_step")
    wanda = make_recipe("ast", mask_metric="wanda").state
    assert wanda == (*mask, "input_square", "input_tokens")


def test_dense_fractions_may_be_all_of_a_run_but_not_more():
    full = make_recipe("fst", dense_warmup_fraction=0.75, dense_tail_fraction=0.25)
    assert not any(schedule.is_sparse_step(full, step, 8) for step in range(8))
    with pytest.raises(ConfigError, match="0.75 [+] dense_tail_fraction 0.375 exceed 1"):
        make_recipe("fst", dense_warmup_fraction=0.75, dense_tail_fraction=0.375)


def test_a_low_rank_branch_is_of_masks_by_rows_that_training_computes_with():
    for flags in (["ste"], ["ast"], ["ste", "--sparsity-phases", "dense:1/2,ste:1/2"]):
        words = ["--sparsity-recipe", *flags, "--slorb-k", "16"]
        if len(flags) == 1:
            assert recipe_of(load_config(words)).name == flags[0]
        else:
            with pytest.raises(ConfigError, match="expected a row-wise mask"):
                recipe_of(load_config(words))
    with pytest.raises(ConfigError, match="slorb_k 16 with the recipe cast"):
        recipe_of(load_config(["--sparsity-recipe", "cast", "--slorb-k", "16"]))


def test_a_foreign_loop_may_be_one_step_long():
    assert recipe_with("ste", {}, 1).name == "ste"
    with pytest.raises(ConfigError, match="train_iters 0, expected at least 1"):
        recipe_with("ste", {}, 0)


def test_the_ramp_begins_with_the_first_sparse_step():
    ast = make_recipe("ast", masked_decay=1.0, masked_decay_ramp_iters=4, dense_warmup_fraction=0.5)
    values = [schedule.masked_decay(ast, step, 12) for step in range(12)]
    assert values == [0.0] * 6 + [0, 0.25, 0.5, 0.75, 1, 1]
