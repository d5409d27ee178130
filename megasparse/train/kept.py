"""What a run keeps of the sparse model that it starts from: masks, scales, the low-rank branch.

Weights alone do not say what a sparse model computes. S-STE's scale would be another one if it were
computed anew, and a mask that is searched anew in the trained weights may differ from the one that
they were trained with. With `freeze_masks` (fine-tuning) masks stay what they were to the end.
"""

from __future__ import annotations

import torch

from megasparse.checkpoint.model import StoredModel
from megasparse.checkpoint.pieces import Piece
from megasparse.checkpoint.stored_mask import mask_part
from megasparse.convert.source import PartSource, check_shape
from megasparse.errors import ConfigError
from megasparse.kernels import is_24
from megasparse.log import warn_once
from megasparse.megatron.grid import Grid
from megasparse.megatron.init import parameter_shard
from megasparse.megatron.sparsify import low_rank_weight_names
from megasparse.sparsity.controller import SparsityController
from megasparse.sparsity.recipe import SparsityRecipe
from megasparse.sparsity.schedule import keeps_masks

Value = tuple[torch.nn.Parameter, torch.Tensor]


def keep(controller: SparsityController, source: PartSource) -> None:
    """Give the states of sparse weights what the weights were trained with.

    Args:
        controller: of a run at step 0, with the source's weights.
        source: that the weights came from.
    """
    _tell_another_model(controller.recipe, source)
    _keep_frozen_scales(controller, source)
    if keeps_masks(controller.recipe):
        _keep_masks(controller, source)


def kept_low_rank_weights(
    model: torch.nn.Module, recipe: SparsityRecipe, source: PartSource | None, grid: Grid
) -> list[Value]:
    """SLoRB's parameters of this rank as they were trained, where masks are kept too.

    Raises:
        ConfigError: the source has a low-rank branch, the run has none.
        CheckpointError: they are of another size.
    """
    if not isinstance(source, StoredModel) or not source.boosted or not keeps_masks(recipe):
        return []
    names = low_rank_weight_names(model)
    if not names and recipe.matches(next(iter(source.boosted)).removesuffix(".weight")):
        raise ConfigError(
            f"{source.where} was trained with slorb_k {source.config.sparsity.slorb_k}, this run "
            "has none: what its low-rank branch has learned would be lost (--slorb-k)"
        )
    values: list[Value] = []
    for name, parameter in model.named_parameters():
        key = f"param/{name}"
        if name not in names or key not in source.reader:
            continue
        shard = parameter_shard(parameter, grid.tp_rank, grid.tp_size)
        check_shape(source.reader.shape(key), shard, name, source.where)
        values.append((parameter, source.reader.read_part(Piece(key, shard)).view(parameter.shape)))
    return values


def _tell_another_model(recipe: SparsityRecipe, source: PartSource) -> None:
    """Warn where the first step computes another model than the source is."""
    if not isinstance(source, StoredModel) or not recipe.is_sparse:
        return
    if source.recipe.is_sparse and not source.pruned:
        warn_once(
            "%s is in a dense phase of its recipe %s: its weights are dense, and are pruned from "
            "the first step on; --sparsity-recipe dense keeps them dense",
            source.where,
            source.recipe.name,
        )
    elif source.phase.projection != _first_sparse(recipe).projection and source.recipe.is_sparse:
        warn_once(
            "%s was trained with the recipe %s, this run prunes its weights in another way (%s)",
            source.where,
            source.recipe.name,
            recipe.name,
        )


def _first_sparse(recipe: SparsityRecipe) -> SparsityRecipe:
    """What prunes the weights first."""
    return next((phase.recipe for phase in recipe.phases if phase.recipe.is_sparse), recipe)


def _keep_frozen_scales(controller: SparsityController, source: PartSource) -> None:
    """Let S-STE's weights go on with the scales that they were trained with: anew they would be
    other ones, and the model another than the one that was saved."""
    recipes = [phase.recipe for phase in controller.recipe.phases]
    soft = [one for one in recipes if one.projection == "soft_threshold"]
    if not any(one.s_ste_scale == "frozen" for one in soft):
        return
    scales = source.frozen_scales()
    for state, weight in controller.weights:
        if state.name in scales:
            state.keep_scale(scales[state.name], weight.device)


def _keep_masks(controller: SparsityController, source: PartSource) -> None:
    """The masks of a checkpoint; weights that came without any are searched once."""
    anew = 0
    for state, weight in controller.weights:
        transposable = state.now.transposable
        mask = None
        if isinstance(source, StoredModel):
            mask = mask_part(source.reader, state.name, source.recipe, state.shard)
        if mask is not None and (not transposable or is_24(mask, dim=0)):
            state.mask, state.last_refresh = mask.to(weight.device), 0
            state.mask_transposable = transposable
            state.moves += 1
            state.invalidate()
            continue
        value = source.read_part(state.name, state.shard)
        anew += not (is_24(value) and (not transposable or is_24(value, dim=0)))
    if anew:
        warn_once(
            "%s holds no masks of this recipe for %d weights, which are not 2:4: their masks are "
            "chosen once, in the first step, and kept; --no-freeze-masks lets them change",
            source.where,
            anew,
        )
