"""The recipes by name: what each sets beside the defaults, as its paper has it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from megasparse.sparsity.phases import _NO_MASK
from megasparse.sparsity.recipe import PRESETS, SparsityRecipe, make_recipe

MASKED = {"regulariser": "masked_decay"}
SET: dict[str, dict[str, Any]] = {
    "dense": {},
    "ste": {"projection": "row"},
    "sr_ste": {"projection": "row", **MASKED, "masked_decay": 0.0002},
    "fst": {
        "projection": "transposable",
        "mvue": "exact",
        **MASKED,
        "masked_decay": 0.00006,
        "dense_tail_fraction": 1 / 6,
    },
    "fst_relaxed": {
        "projection": "transposable",
        "mvue": "exact",
        **MASKED,
        "masked_decay": 0.00006,
        "sparsity_phases": "transposable:2/3,row+grad-input=double-pruned:1/3",
    },
    "s_ste": {"projection": "soft_threshold", "mvue": "exact"},
    "s_ste_3": {
        "projection": "soft_threshold",
        "mvue": "exact",
        "sparse_grad_input": "double-pruned",
    },
    "ast": {
        "projection": "row",
        "regulariser": "decoupled_masked_decay",
        "masked_decay": 0.0001,
        "masked_decay_ramp_iters": 10000,
        "mask_update_interval": 10,
    },
    "cast": {
        "projection": "row",
        "regulariser": "masked_l1_decay",
        "masked_decay": 0.0000004,
        "dense_forward": True,
        "weight_scale_groups": 2,
        "mask_update_interval": 10,
    },
}


@pytest.mark.parametrize("name", SET)
def test_a_recipe_sets_what_its_paper_says_and_nothing_more(name):
    for recipe in (PRESETS[name], make_recipe(name)):
        plain = dataclasses.asdict(SparsityRecipe(name))
        found = dataclasses.asdict(recipe)
        assert {key: found[key] for key in found if found[key] != plain[key]} == SET[name]


def test_every_recipe_is_here_and_a_phase_without_masks_decays_nothing():
    assert set(SET) == set(PRESETS)
    assert _NO_MASK == {
        "regulariser": "none",
        "masked_decay": 0.0,
        "masked_decay_before_clipping": False,
        "masked_decay_rho": None,
    }
    assert repr(_NO_MASK["masked_decay"]) == "0.0"
