"""Which phase a step is in, and how strong its decay is: pure functions of the optimizer step.

Steps are numbered by the count of optimizer steps done before: the first is 0. Nothing here keeps
state, so a resumed run cannot be in another phase than the undisturbed one.
"""

from __future__ import annotations

import functools
from fractions import Fraction
from typing import NamedTuple

from megasparse.sparsity.recipe import SparsityRecipe


class Span(NamedTuple):
    """A phase as steps of a run.

    Attributes:
        number: of the phase, from 0; phases too short for a step have no span.
        steps: that are in it.
        recipe: what is done in it.
        masks: the recipe whose masks are known in it: its own; in a dense phase, where they only
            measure flips, that of the sparse phase before it, or else of the one after it.
    """

    number: int
    steps: range
    recipe: SparsityRecipe
    masks: SparsityRecipe


@functools.lru_cache(maxsize=64)
def spans(recipe: SparsityRecipe, train_iters: int) -> tuple[Span, ...]:
    """The phases of a run of `train_iters` steps, in order."""
    phases = recipe.phases
    ends, done = [0], Fraction(0)
    for phase in phases:
        done += phase.share
        ends.append(_boundary(done, train_iters))
    masks = [phase.recipe for phase in phases]
    for number in range(1, len(phases)):
        if not masks[number].is_sparse:
            masks[number] = masks[number - 1]
    for number in reversed(range(len(phases) - 1)):
        if not masks[number].is_sparse:
            masks[number] = masks[number + 1]
    return tuple(
        Span(number, range(ends[number], ends[number + 1]), phase.recipe, masks[number])
        for number, phase in enumerate(phases)
        if ends[number] < ends[number + 1]
    )


def _boundary(share: Fraction, train_iters: int) -> int:
    """Steps in the first `share` of a run: counted from the end that is nearer, so that a half step
    goes the same way in a warm-up and in a tail."""
    if share <= Fraction(1, 2):
        return round(share * train_iters)
    return train_iters - round((1 - share) * train_iters)


def span_at(recipe: SparsityRecipe, step: int, train_iters: int) -> Span:
    """The phase of a step. After the last step it stays what it was in it."""
    step = min(step, train_iters - 1)
    return next(span for span in spans(recipe, train_iters) if step in span.steps)


def is_sparse_step(recipe: SparsityRecipe, step: int, train_iters: int) -> bool:
    """Whether GEMMs use pruned weights in `step`."""
    return span_at(recipe, step, train_iters).recipe.is_sparse


def masked_decay(recipe: SparsityRecipe, step: int, train_iters: int) -> float:
    """lambda at `step`: its phase's, 0 where that is dense, ramped linearly where it has a ramp.

    AST eq. 2: lambda(t) = alpha t for t <= T0, then alpha T0; t counts from the phase's first step.
    FST and SR-STE have no ramp; CAST's is as long as the phase.
    """
    span = span_at(recipe, step, train_iters)
    if span.recipe.regulariser == "masked_l1_decay":
        return span.recipe.masked_decay * decayed_share(recipe, step, train_iters)
    if span.recipe.regulariser == "none":
        return 0.0
    ramp = span.recipe.masked_decay_ramp_iters
    if ramp == 0:
        return span.recipe.masked_decay
    return span.recipe.masked_decay * min(1.0, (step - span.steps.start) / ramp)


def keeps_masks(recipe: SparsityRecipe) -> bool:
    """Whether there are masks, and they never change."""
    return recipe.freeze_masks and recipe.has_mask


def decayed_share(recipe: SparsityRecipe, step: int, train_iters: int) -> float:
    """alpha of CAST (algorithm 1): t / T in the sparse phase of T steps, t from 0; else 0."""
    span = span_at(recipe, step, train_iters)
    return (step - span.steps.start) / len(span.steps) if span.recipe.is_sparse else 0.0


def refresh_due(
    recipe: SparsityRecipe, step: int, last_refresh: int, first_sparse_step: int = 0
) -> bool:
    """Whether the mask must be computed anew before `step` is computed.

    Refreshes fall on multiples of the interval and on the first step of a sparse phase: a mask of
    the phase before is of another kind, or only measures flips, and then there is one only where
    they are tracked. Frozen masks are searched once, if none came with the weights. Asking twice
    for one step refreshes once, so an evaluation between two steps, or a resume, changes nothing.

    Args:
        recipe: of the phase.
        last_refresh: step of the latest refresh, or -1.
        first_sparse_step: of the phase, if it is sparse, else 0.
    """
    if keeps_masks(recipe):
        return last_refresh < 0
    interval = recipe.mask_update_interval
    of_phase_before = last_refresh < first_sparse_step <= step
    return last_refresh < 0 or of_phase_before or step // interval > last_refresh // interval
