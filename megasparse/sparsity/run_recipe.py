"""The recipe of a run: what its configuration sets, on top of a preset."""

from __future__ import annotations

import dataclasses
from typing import cast

from megasparse.config import RunConfig, SparsityConfig
from megasparse.config.schema.sparsity import MvueGroups
from megasparse.errors import ConfigError
from megasparse.sparsity.phases import leading_recipe
from megasparse.sparsity.recipe import PRESETS, SparsityRecipe, make_recipe, preset_names

# What a run may set of a recipe: the fields that both have.
_SETTINGS = {field.name for field in dataclasses.fields(SparsityRecipe)} & {
    field.name for field in dataclasses.fields(SparsityConfig)
}


def recipe_of(config: RunConfig) -> SparsityRecipe:
    """The run's recipe: the preset with the flags that were given.

    Raises:
        ConfigError: a setting that the recipe has no use for.
    """
    sparsity = config.sparsity
    settings = {name: getattr(sparsity, name) for name in _SETTINGS}
    settings["sparse_layers"] = tuple(sparsity.sparse_layers)
    settings["mvue_groups"] = _groups(sparsity, config.train.micro_batch_size)
    name = sparsity.sparsity_recipe
    if sparsity.sparsity_phases and name == "dense":
        name = leading_recipe(sparsity.sparsity_phases, PRESETS)
    recipe = make_recipe(name, **settings)
    others = {p.recipe.projection for p in recipe.phases} if recipe.sparsity_phases else set()
    by_rows = {recipe.projection, *others} == {"row"} and not recipe.dense_forward
    if sparsity.slorb_k is not None and not by_rows:
        raise ConfigError(
            f"slorb_k {sparsity.slorb_k} with the recipe {recipe.name}, expected a row-wise mask: "
            f"{preset_names(lambda one: one.projection == 'row' and not one.dense_forward)}"
        )
    return recipe


def _groups(sparsity: SparsityConfig, micro_batch_size: int) -> MvueGroups | None:
    """What `auto` means: rows are (S, B), so four neighbours are of four sequences if 4 divides B.

    A recipe that draws nothing has no groups to choose.
    """
    if sparsity.mvue_groups != "auto":
        return cast("MvueGroups | None", sparsity.mvue_groups)
    preset = PRESETS.get(sparsity.sparsity_recipe)
    mvue = sparsity.mvue or (preset.mvue if preset else "off")
    return "strided" if mvue != "off" and micro_batch_size % 4 else "neighbours"
