"""Sparsity recipes: what a training method does to each of the three GEMMs of a linear layer.

For `Z = X W^T` with `X (T, K)`, `W (N, K)`:

| recipe  | W~ in output and grad_input      | grad_weight  | regulariser                  |
|---------|----------------------------------|--------------|------------------------------|
| dense   | W                                | dZ^T X       | none                         |
| ste     | W o M, row-wise 2:4              | dZ^T X       | none                         |
| sr_ste  | W o M, row-wise 2:4              | dZ^T X       | grad += lambda (1-M) o W     |
| fst     | W o M, M transposable; dense end | MVUE(dZ^T) X | grad += lambda (1-M) o W     |
| s_ste   | beta * S(W), soft threshold      | MVUE(dZ^T) X | none                         |
| s_ste_3 | the same; double-pruned          | MVUE(dZ^T) X | none                         |
| ast     | W o M, row-wise 2:4              | dZ^T X       | decoupled, lambda(t) ramps   |
| cast    | A o W; at the end A o W o M      | dZ^T X       | L1, decoupled, over the run  |

A row-wise W~ is 2:4 along K, so the output GEMM is sparse and grad_input is dense; a transposable
one is 2:4 along N as well, so grad_input is sparse too. With "double-pruned" grad_input multiplies
`W~_d = W~ o C` in place of W~, where C keeps the two largest of each four along N: an approximation
of the gradient that is 2:4. `dW` is dense in all of them: the gradient passes straight through the
projection to the dense master weight.

A run is a schedule of phases, each with a recipe of its own (`phases.py`, `schedule.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, Literal

from megasparse.config.schema.sparsity import (
    SPARSE_LAYERS,
    MaskMetric,
    Mvue,
    MvueGroups,
    OperandPacking,
    RecipeName,
    ScaleUpdate,
    SparseGradInput,
)
from megasparse.errors import ConfigError
from megasparse.sparsity.phases import Phase, phases_of
from megasparse.sparsity.recipe_checks import refusal

Projection = Literal["none", "row", "transposable", "soft_threshold"]
Regulariser = Literal["none", "masked_decay", "decoupled_masked_decay", "masked_l1_decay"]


@dataclass(frozen=True)
class SparsityRecipe:
    """One training method; frozen, validated, named.

    A field that the configuration's sparsity group has too is a setting of the run (`recipe_of`).

    Attributes:
        name: preset it comes from; sparse_layers: shell patterns of the linears that it prunes.
        projection: how the effective weight W~ follows from the master weight W.
        mvue: how dZ^T is made 2:4 along tokens for the weight gradient: not at all, by the exact
            minimum-variance sampler, or by the papers' approximation.
        mvue_groups: which four tokens share a group of MVUE: neighbours, or tokens a quarter of the
            micro-batch apart (strided).
        sparse_grad_input: what a row-wise W~ is in grad_input: W~ itself (exact), by a dense GEMM,
            or the two largest of each four along N of it (double-pruned), by a 2:4 one.
        operand_packing: who packs operands in 16 bits on a GPU: "cusparselt", the library itself;
            "auto", our kernels where they write the GPU's layout, else the library.
        regulariser: where lambda (1-M) o W enters: nowhere, in the gradient between clipping and
            AdamW (FST, SR-STE), or decoupled from the first moment (AST); or lambda sign(W) so,
            in place of a growing share of the momentum (CAST).
        masked_decay: lambda, per step.
        masked_decay_before_clipping: the gradient is clipped with its decay, by their common norm:
            clip(g + lambda (1-M) o W) instead of clip(g) + lambda (1-M) o W.
        masked_decay_rho: each weight's lambda follows from its second moments, as rho mean sqrt(v)
            / mean |w| over masked entries; None: it is masked_decay.
        masked_decay_update_interval: optimizer steps between two such lambdas.
        masked_decay_ramp_iters: lambda(t) = masked_decay * min(1, t / ramp); 0: constant.
        dense_forward: training computes with the dense weight, and the mask only says what decays;
            evaluation and export prune (CAST).
        weight_scale_groups: learnable scales of each row of a weight, for as many groups of its
            inputs (CAST); 0: none.
        mask_metric: what a row-wise mask keeps the largest of: |w|, or |w| times the root mean
            square of its input channel so far (Wanda).
        mask_update_interval: steps between mask refreshes; of a soft threshold, between flip rates.
        freeze_masks: masks stay those that the run starts with.
        s_ste_scale: when beta of a soft-threshold weight is computed: at its first sparse step, or
            of the current weight in every one.
        dense_warmup_fraction, dense_tail_fraction: shares of the run that are dense.
        sparsity_phases: the whole schedule, in the words of `phases.py`, in place of these two;
            `phases` are what either comes to.
        simulate_fp8: round the operands of all GEMMs of the sparse phase to FP8 as S-STE's paper
            does (e4m3 forward, e5m2 backward), computing in higher precision.
    """

    name: RecipeName
    sparse_layers: tuple[str, ...] = SPARSE_LAYERS
    projection: Projection = "none"
    mvue: Mvue = "off"
    mvue_groups: MvueGroups = "neighbours"
    sparse_grad_input: SparseGradInput = "exact"
    operand_packing: OperandPacking = "auto"
    regulariser: Regulariser = "none"
    masked_decay: float = 0.0
    masked_decay_before_clipping: bool = False
    masked_decay_rho: float | None = None
    masked_decay_update_interval: int = 100
    masked_decay_ramp_iters: int = 0
    dense_forward: bool = False
    weight_scale_groups: int = 0
    mask_metric: MaskMetric = "magnitude"
    mask_update_interval: int = 1
    freeze_masks: bool = False
    s_ste_scale: ScaleUpdate = "frozen"
    dense_warmup_fraction: float = 0.0
    dense_tail_fraction: float = 0.0
    sparsity_phases: str | None = None
    simulate_fp8: bool = False

    def __post_init__(self) -> None:
        # Presets are made before their names can be asked for.
        if reason := refusal(self, lambda kind: preset_names(kind)):
            raise ConfigError(reason)

    @cached_property
    def phases(self) -> tuple[Phase, ...]:
        """What the run does, in order; the shares sum to 1. ConfigError where it cannot be."""
        return phases_of(self, PRESETS)

    @property
    def has_mask(self) -> bool:
        """Whether a 0/1 mask is the state of a weight."""
        return self.projection in ("row", "transposable")

    @property
    def is_sparse(self) -> bool:
        """Whether it makes a GEMM sparse; of a run: whether one of some phase may be."""
        return self.projection != "none"

    def matches(self, name: str) -> bool:
        """Whether the linear of this name in the whole model is made sparse.

        Args:
            name: of the module, e.g. `decoder.layers.0.mlp.linear_fc1`.
        """
        return self.is_sparse and any(fnmatchcase(name, pattern) for pattern in self.sparse_layers)

    def unmatched(self, names: Iterable[str]) -> list[str]:
        """The patterns that none of these linears is named like."""
        there = list(names)
        return [p for p in self.sparse_layers if not any(fnmatchcase(name, p) for name in there)]

    @property
    def transposable(self) -> bool:
        """Whether W~^T is 2:4 as well."""
        return self.projection == "transposable"

    @property
    def strided_groups(self) -> bool:
        """Whether dZ^T is drawn in groups of tokens that lie far apart."""
        return self.mvue != "off" and self.mvue_groups == "strided"

    @property
    def double_pruned(self) -> bool:
        """Whether grad_input multiplies W~ pruned along N once more."""
        return self.sparse_grad_input == "double-pruned"

    @property
    def packed_transpose(self) -> Literal["packed", "double-pruned"] | None:
        """What the sparse operand of grad_input is made of: W~^T, W~_d^T, or there is none."""
        if self.transposable:
            return "packed"
        return "double-pruned" if self.double_pruned else None

    @property
    def state(self) -> tuple[str, ...]:
        """What each weight keeps from step to step, and checkpoints with it."""
        kept = {
            "none": (),
            "row": ("mask", "counters", "flips"),
            "transposable": ("mask", "counters", "flips"),
            # The mask only measures flip rates; the projection follows from weight and scale.
            "soft_threshold": ("scale", "mask", "counters", "flips"),
        }
        rho = ("decay", "decay_step") if self.masked_decay_rho is not None else ()
        wanda = ("input_square", "input_tokens") if self.mask_metric == "wanda" else ()
        return kept[self.projection] + wanda + rho

    @property
    def sparse_gemms(self) -> tuple[str, ...]:
        """The GEMMs with a 2:4 operand, of output, grad_input, grad_weight."""
        chosen = {
            "output": self.is_sparse and not self.dense_forward,
            "grad_input": self.packed_transpose is not None,
            "grad_weight": self.mvue != "off",
        }
        return tuple(name for name, sparse in chosen.items() if sparse)


PRESETS: dict[str, SparsityRecipe] = {
    recipe.name: recipe
    for recipe in (
        SparsityRecipe("dense"),
        SparsityRecipe("ste", projection="row"),
        SparsityRecipe("sr_ste", projection="row", regulariser="masked_decay", masked_decay=2e-4),
        SparsityRecipe(
            "fst",
            projection="transposable",
            mvue="exact",
            regulariser="masked_decay",
            masked_decay=6e-5,
            dense_tail_fraction=1 / 6,
        ),
        SparsityRecipe(
            "fst_relaxed",
            projection="transposable",
            mvue="exact",
            regulariser="masked_decay",
            masked_decay=6e-5,
            sparsity_phases="transposable:2/3,row+grad-input=double-pruned:1/3",
        ),
        SparsityRecipe("s_ste", projection="soft_threshold", mvue="exact"),
        SparsityRecipe(
            "s_ste_3",
            projection="soft_threshold",
            mvue="exact",
            sparse_grad_input="double-pruned",
        ),
        SparsityRecipe(
            "ast",
            projection="row",
            regulariser="decoupled_masked_decay",
            masked_decay=1e-4,
            masked_decay_ramp_iters=10_000,
            mask_update_interval=10,
        ),
        SparsityRecipe(
            "cast",
            projection="row",
            regulariser="masked_l1_decay",
            masked_decay=4e-7,
            dense_forward=True,
            weight_scale_groups=2,
            mask_update_interval=10,
        ),
    )
}


def make_recipe(name: str, **overrides: Any) -> SparsityRecipe:
    """The preset `name` with the overrides that are not None.

    Raises:
        ConfigError: unknown name, or an override that the method has no use for.
    """
    if name not in PRESETS:
        raise ConfigError(f"sparsity_recipe {name!r}, expected one of {', '.join(PRESETS)}")
    preset = PRESETS[name]
    given = {key: value for key, value in overrides.items() if value is not None}
    if preset.regulariser == "none" and given.get("masked_decay"):
        raise ConfigError(f"masked_decay {given['masked_decay']}: the recipe {name} has no decay")
    if given.get("masked_decay") and given.get("masked_decay_rho"):
        raise ConfigError(
            f"masked_decay {given['masked_decay']} with masked_decay_rho "
            f"{given['masked_decay_rho']}, expected one of the two"
        )
    if not preset.is_sparse and given.get("mvue", "off") != "off":
        raise ConfigError(f"mvue {given['mvue']}: the recipe {name} has no sparse GEMM")
    if given.get("sparsity_phases"):  # in place of what the preset says of its dense steps
        given = {"dense_warmup_fraction": 0.0, "dense_tail_fraction": 0.0} | given
    if not preset.is_sparse and given.get("simulate_fp8"):
        raise ConfigError(f"simulate_fp8: the recipe {name} has no sparse GEMM")
    return _checked(dataclasses.replace(preset, **given))


def recipe_with(
    recipe: str | SparsityRecipe, settings: dict[str, Any], train_iters: int | None
) -> SparsityRecipe:
    """A preset by its name, or a recipe, with settings, for a loop that is not ours.

    Args:
        train_iters: length of the run; None: not known, so that all of it is sparse.

    Raises:
        ConfigError: unknown names, or what asks for a length, or for Wanda's calibration.
    """
    fields = {field.name for field in dataclasses.fields(SparsityRecipe)}
    unknown = sorted(set(settings) - fields)
    if unknown:
        raise ConfigError(
            f"unknown setting {unknown[0]!r} of a recipe, expected one of "
            f"{', '.join(sorted(fields - {'name'}))}"
        )
    if settings.get("mvue_groups") == "auto":
        # Rows are (B, S) here: four neighbours are always of one sequence.
        settings = {**settings, "mvue_groups": "strided"}
    if isinstance(recipe, SparsityRecipe):
        made = _checked(dataclasses.replace(recipe, **settings))
    else:
        made = make_recipe(recipe, **settings)
    if made.mask_metric != "magnitude":
        raise ConfigError(f"mask_metric {made.mask_metric}: only a run of megasparse calibrates")
    if made.dense_forward:
        raise ConfigError(f"recipe {made.name}: only a run of megasparse trains so")
    if made.masked_decay_rho is not None:
        raise ConfigError("masked_decay_rho: only a run of megasparse follows second moments")
    if train_iters is not None:
        if train_iters < 1:
            raise ConfigError(f"train_iters {train_iters}, expected at least 1")
        return made
    for name in ("dense_warmup_fraction", "dense_tail_fraction"):
        if settings.get(name):
            raise ConfigError(f"{name} {settings[name]}: expected train_iters with it")
    if made.sparsity_phases:
        raise ConfigError(f"sparsity_phases {made.sparsity_phases!r}: expected train_iters with it")
    return dataclasses.replace(made, dense_warmup_fraction=0.0, dense_tail_fraction=0.0)


def _checked(recipe: SparsityRecipe) -> SparsityRecipe:
    assert recipe.phases  # which raises where they cannot be
    return recipe


def preset_names(chosen: Callable[[SparsityRecipe], bool]) -> str:
    """Names of the presets of a kind, for messages: "a, b or c"."""
    *names, last = (name for name, recipe in PRESETS.items() if chosen(recipe))
    return f"{', '.join(names)} or {last}" if names else last
