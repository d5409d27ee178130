"""A run as a schedule of phases: `dense:0.1,fst:0.57,row+grad-input=exact+mvue=off:0.33`.

Each phase has a recipe of its own. In a text it is `NAME[+OPTION=VALUE]...:SHARE`. NAME is a
recipe, or a projection (`transposable`, `row`, `soft_threshold`) for the run's recipe with other
weights; what an option does not say is the recipe's. Shares are of the run's steps; they are
decimals or fractions, and their sum is 1.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple, get_args

from megasparse.config.schema.sparsity import Mvue, SparseGradInput
from megasparse.errors import ConfigError

_FORM = "NAME[+OPTION=VALUE]...:SHARE, as in fst:2/3,row+mvue=off:1/3"
# Option -> the recipe's field, and the words that it may be set to; None: a number.
_OPTIONS: dict[str, tuple[str, tuple[str, ...] | None]] = {
    "grad-input": ("sparse_grad_input", get_args(SparseGradInput)),
    "mvue": ("mvue", get_args(Mvue)),
    "decay": ("masked_decay", None),
}


# What all phases of a run have alike.
_OF_THE_RUN = (
    "sparse_layers",
    "mvue_groups",
    "operand_packing",
    "simulate_fp8",
    "freeze_masks",
)
# A projection's name -> what the run's recipe has no use for with it.
_NO_MASK = {
    "regulariser": "none",
    "masked_decay": 0.0,
    "masked_decay_before_clipping": False,
    "masked_decay_rho": None,
}
_NO_SCALE = {"s_ste_scale": "frozen"}
_NOT_BY_ROWS = {"mask_metric": "magnitude"}
PROJECTIONS: dict[str, dict[str, Any]] = {
    "transposable": {**_NO_SCALE, **_NOT_BY_ROWS, "sparse_grad_input": "exact"},
    "row": _NO_SCALE,
    "soft_threshold": {**_NO_MASK, **_NOT_BY_ROWS},
}


class Phase(NamedTuple):
    """A part of a run.

    Attributes:
        share: of its steps.
        recipe: what is done in it, a SparsityRecipe without phases; `dense` where nothing is
            sparse.
    """

    share: Fraction
    recipe: Any


@dataclass(frozen=True)
class PhaseText:
    """One phase as it was written.

    Attributes:
        name: of a recipe or a projection.
        share: of the run's steps.
        settings: fields of the recipe that it sets.
    """

    name: str
    share: Fraction
    settings: dict[str, Any]


def phases_of(run: Any, presets: Mapping[str, Any]) -> tuple[Phase, ...]:
    """What a run's recipe comes to: its text, or its dense fractions.

    Args:
        run: a SparsityRecipe.
        presets: all recipes by name.

    Raises:
        ConfigError: a phase that cannot be.
    """
    if run.sparsity_phases:
        texts = parse(run.sparsity_phases)
        phases = tuple(Phase(text.share, _recipe(run, text, presets)) for text in texts)
        if any(phase.recipe.dense_forward for phase in phases):
            raise ConfigError(
                f"sparsity_phases {run.sparsity_phases!r} with cast, whose decay grows over the "
                "whole run; expected other recipes"
            )
        metrics = {phase.recipe.mask_metric for phase in phases if phase.recipe.is_sparse}
        if len(metrics) > 1:
            raise ConfigError(
                f"mask_metric wanda with sparsity_phases {run.sparsity_phases!r}, expected phases "
                f"that are dense, row or {run.name}"
            )
        rhos = {
            phase.recipe.masked_decay_rho for phase in phases if phase.recipe.regulariser != "none"
        }
        if (rhos or {run.masked_decay_rho}) != {run.masked_decay_rho}:
            raise ConfigError(
                f"masked_decay_rho {run.masked_decay_rho} with sparsity_phases "
                f"{run.sparsity_phases!r}, expected decay of the run's recipe alone: row, "
                f"transposable or {run.name}"
            )
        if run.masked_decay_rho is not None and any("masked_decay" in t.settings for t in texts):
            raise ConfigError(
                f"masked_decay_rho {run.masked_decay_rho} with a phase's decay, expected one of "
                "the two"
            )
        return phases
    if not run.is_sparse:
        return (Phase(Fraction(1), run),)
    warmup, tail = (
        Fraction(share).limit_denominator(1_000_000)
        for share in (run.dense_warmup_fraction, run.dense_tail_fraction)
    )
    dense = dataclasses.replace(presets["dense"], sparse_layers=run.sparse_layers)
    shares = ((warmup, dense), (1 - warmup - tail, _alone(run)), (tail, dense))
    return tuple(Phase(share, recipe) for share, recipe in shares if share > 0)


def leading_recipe(text: str, presets: Mapping[str, Any]) -> str:
    """The recipe of a run that names none: the first sparse one of its phases.

    Raises:
        ConfigError: its phases name none.
    """
    named = (phase.name for phase in parse(text))
    found = next((name for name in named if name != "dense" and name in presets), None)
    if found is None:
        raise ConfigError(
            f"sparsity_phases {text!r} names no recipe whose decay and MVUE its phases have; "
            "expected one in a phase (fst:1/2), or --sparsity-recipe"
        )
    return found


def summary(recipe: Any) -> str:
    """In words, what a phase by a SparsityRecipe does."""
    if not recipe.is_sparse:
        return "dense"
    words = [
        f"{recipe.projection.replace('_', ' ')} weights",
        f"2:4 in {', '.join(recipe.sparse_gemms)}",
    ]
    if recipe.double_pruned:
        words.append("grad_input double-pruned")
    if recipe.mvue != "off":
        words.append(f"MVUE {recipe.mvue}")
    if recipe.regulariser != "none":
        words.append(f"decay {recipe.masked_decay:g}")
    return "; ".join(words)


def _alone(recipe: Any, **changes: Any) -> Any:
    """A recipe for a phase: without a schedule of its own."""
    alone = {"dense_warmup_fraction": 0.0, "dense_tail_fraction": 0.0, "sparsity_phases": None}
    return dataclasses.replace(recipe, **alone, **changes)


def _recipe(run: Any, text: PhaseText, presets: Mapping[str, Any]) -> Any:
    """What a phase of a run's recipe is."""
    name, settings = text.name, dict(text.settings)
    if name == "dense":
        if settings:
            raise ConfigError("sparsity_phases: a phase `dense` has options, expected none")
        return _alone(presets["dense"], sparse_layers=run.sparse_layers)
    if name in PROJECTIONS:
        made = _alone(run, projection=name, **PROJECTIONS[name])
    elif name == run.name and not presets[name].sparsity_phases:
        made = _alone(run)
    elif name in presets and not presets[name].sparsity_phases:
        shared = {field: getattr(run, field) for field in _OF_THE_RUN}
        if presets[name].mvue == "off":
            del shared["mvue_groups"]
        made = _alone(presets[name], **shared)
    else:
        known = [*PROJECTIONS, *(one for one in presets if not presets[one].sparsity_phases)]
        raise ConfigError(f"sparsity_phases: phase {name!r}, expected one of {', '.join(known)}")
    if settings.get("masked_decay") and made.regulariser == "none":
        settings["regulariser"] = "masked_decay"
    if settings.get("mvue", made.mvue) == "off":
        settings["mvue_groups"] = "neighbours"  # nothing is drawn
    return dataclasses.replace(made, **settings)


def parse(text: str) -> tuple[PhaseText, ...]:
    """The phases of a text, in order.

    Raises:
        ConfigError: names the phase, what was found and what was expected.
    """
    phases = tuple(_phase(part.strip()) for part in text.split(","))
    total = sum(phase.share for phase in phases)
    if total != 1:
        raise ConfigError(
            f"sparsity_phases {text!r}: the shares sum to {float(total):g}, expected 1 (fractions "
            "are exact: 1/3)"
        )
    return phases


def _phase(part: str) -> PhaseText:
    head, colon, share = part.rpartition(":")
    if not colon or not head:
        raise ConfigError(f"sparsity_phases: phase {part!r}, expected {_FORM}")
    name, *options = (word.strip() for word in head.split("+"))
    settings = dict(_option(part, option) for option in options)
    if len(settings) < len(options):
        raise ConfigError(f"sparsity_phases: phase {part!r} sets an option twice, expected once")
    return PhaseText(name, _share(part, share.strip()), settings)


def _share(part: str, share: str) -> Fraction:
    try:
        found = Fraction(share)
    except (ValueError, ZeroDivisionError):
        found = Fraction(0)
    if not 0 < found <= 1:
        raise ConfigError(
            f"sparsity_phases: phase {part!r} has the share {share!r}, expected a number above 0 "
            "and up to 1, as 0.25 or 1/4"
        )
    return found


def _option(part: str, option: str) -> tuple[str, Any]:
    name, _, value = option.partition("=")
    if name not in _OPTIONS:
        raise ConfigError(
            f"sparsity_phases: phase {part!r} has the option {option!r}, expected "
            f"{', '.join(f'{known}=VALUE' for known in _OPTIONS)}"
        )
    field, words = _OPTIONS[name]
    if words is not None:
        if value not in words:
            raise ConfigError(
                f"sparsity_phases: phase {part!r} has {name}={value}, expected {', '.join(words)}"
            )
        return field, value
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not (number >= 0 and math.isfinite(number)):
        raise ConfigError(
            f"sparsity_phases: phase {part!r} has {name}={value}, expected a number of at least 0"
        )
    return field, number
