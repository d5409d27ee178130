"""What settings of a recipe do not go together; each check returns the reason, or None."""

from __future__ import annotations

from typing import Protocol


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
