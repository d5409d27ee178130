"""What settings of a recipe do not go together; each check returns the reason, or None."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol


class Settings(Protocol):
    """A recipe, as far as the checks ask."""

    @property
    def mvue(self) -> str: ...
    @property
    def mvue_groups(self) -> str: ...
    @property
    def operand_packing(self) -> str: ...
    @property
    def regulariser(self) -> str: ...
    @property
    def masked_decay_rho(self) -> float | None: ...
    @property
    def masked_decay_before_clipping(self) -> bool: ...
    @property
    def masked_decay_ramp_iters(self) -> int: ...
    @property
    def simulate_fp8(self) -> bool: ...
    @property
    def dense_forward(self) -> bool: ...
    @property
    def weight_scale_groups(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def projection(self) -> str: ...
    @property
    def double_pruned(self) -> bool: ...
    @property
    def dense_warmup_fraction(self) -> float: ...
    @property
    def dense_tail_fraction(self) -> float: ...
    @property
    def s_ste_scale(self) -> str: ...
    @property
    def mask_metric(self) -> str: ...


def groups_refusal(recipe: Settings) -> str | None:
    """Groups of MVUE are of draws."""
    if recipe.mvue_groups not in ("neighbours", "strided"):
        return f"mvue_groups {recipe.mvue_groups!r}, expected neighbours or strided"
    if recipe.mvue_groups == "strided" and recipe.mvue == "off":
        return "mvue_groups strided, but with mvue off nothing is drawn"
    return None


def packing_refusal(recipe: Settings) -> str | None:
    """There are two who can pack operands."""
    if recipe.operand_packing not in ("auto", "cusparselt"):
        return f"operand_packing {recipe.operand_packing!r}, expected auto or cusparselt"
    return None


def rho_refusal(recipe: Settings) -> str | None:
    """A lambda that follows second moments is of a decay on gradients."""
    rho = recipe.masked_decay_rho
    if rho is None:
        return None
    if recipe.regulariser != "masked_decay":
        return f"masked_decay_rho {rho}, but no decay is added to gradients; expected sr_ste or fst"
    for name in ("masked_decay_before_clipping", "masked_decay_ramp_iters"):
        if getattr(recipe, name):
            return f"masked_decay_rho {rho} with {name}, expected one of the two"
    return None


def dense_forward_refusal(recipe: Settings) -> str | None:
    """Training with dense GEMMs (CAST) has scales, a decay over the whole run, and nothing 2:4."""
    if not recipe.dense_forward:
        groups = recipe.weight_scale_groups
        return (
            f"weight_scale_groups {groups}, but it has no scales; expected cast" if groups else None
        )
    given = {
        f"mvue {recipe.mvue}": recipe.mvue != "off",
        "simulate_fp8": recipe.simulate_fp8,
        f"masked_decay_ramp_iters {recipe.masked_decay_ramp_iters}": recipe.masked_decay_ramp_iters,
        "sparse_grad_input double-pruned": recipe.double_pruned,
    }
    for name, there in given.items():
        if there:
            return f"{name}, but it trains with dense GEMMs and its decay grows over the whole run"
    return None


def refusal(recipe: Any, presets: Callable[[Callable[[Any], bool]], str]) -> str | None:
    """Why a recipe cannot be, or None.

    Args:
        recipe: a SparsityRecipe.
        presets: the names of the recipes of a kind, for messages.
    """
    if recipe.mask_update_interval < 1:
        return f"mask_update_interval {recipe.mask_update_interval}, expected >= 1"
    reason = groups_refusal(recipe) or rho_refusal(recipe) or packing_refusal(recipe)
    reason = reason or dense_forward_refusal(recipe)
    if reason is not None:
        return f"recipe {recipe.name}: {reason}"
    if recipe.dense_warmup_fraction + recipe.dense_tail_fraction > 1.0:
        return (
            f"recipe {recipe.name}: dense_warmup_fraction {recipe.dense_warmup_fraction} + "
            f"dense_tail_fraction {recipe.dense_tail_fraction} exceed 1"
        )
    if recipe.sparsity_phases and (recipe.dense_warmup_fraction or recipe.dense_tail_fraction):
        return (
            f"recipe {recipe.name}: sparsity_phases {recipe.sparsity_phases!r} with "
            "dense_warmup_fraction or dense_tail_fraction, expected phases alone: dense:SHARE"
        )
    if recipe.regulariser != "none" and recipe.projection not in ("row", "transposable"):
        return (
            f"recipe {recipe.name}: {recipe.regulariser} needs a mask, "
            f"but the projection is {recipe.projection!r}"
        )
    if recipe.double_pruned and recipe.projection not in ("row", "soft_threshold"):
        return (
            f"sparse_grad_input {recipe.sparse_grad_input} with the recipe {recipe.name}, "
            "expected weights that are 2:4 by rows alone: "
            f"{presets(lambda one: one.projection in ('row', 'soft_threshold'))}"
        )
    if recipe.masked_decay_before_clipping and recipe.regulariser != "masked_decay":
        return (
            f"masked_decay_before_clipping: the recipe {recipe.name} adds no decay to gradients, "
            f"expected {presets(lambda one: one.regulariser == 'masked_decay')}"
        )
    if recipe.s_ste_scale != "frozen" and recipe.projection != "soft_threshold":
        return (
            f"s_ste_scale {recipe.s_ste_scale}: the recipe {recipe.name} has no scale, expected "
            f"{presets(lambda one: one.projection == 'soft_threshold')}"
        )
    if recipe.mask_metric == "wanda" and recipe.projection != "row":
        return (
            f"mask_metric wanda with the recipe {recipe.name}, expected row-wise masks: "
            f"{presets(lambda one: one.projection == 'row')}"
        )
    return None
