"""When a recipe is sparse and how strong its decay is: pure functions of the optimizer step.

Steps are numbered by the count of optimizer steps done before: the first is 0. Nothing here keeps
state, so a resumed run cannot be in another phase than the undisturbed one.
"""

from __future__ import annotations

from megasparse.sparsity.recipe import SparsityRecipe


def sparse_range(recipe: SparsityRecipe, train_iters: int) -> range:
    """The steps at which GEMMs use the pruned weights."""
    if not recipe.is_sparse:
        return range(0)
    start = round(recipe.dense_warmup_fraction * train_iters)
    stop = train_iters - round(recipe.dense_tail_fraction * train_iters)
    return range(start, stop)


def is_sparse_step(recipe: SparsityRecipe, step: int, train_iters: int) -> bool:
    """Whether `step` is sparse. After the last step the phase stays what it was in it."""
    return min(step, train_iters - 1) in sparse_range(recipe, train_iters)


def masked_decay(recipe: SparsityRecipe, step: int, train_iters: int) -> float:
    """lambda at `step`: 0 outside the sparse phase, ramped linearly inside it.

    AST eq. 2: lambda(t) = alpha t for t <= T0, then alpha T0; t counts from the first sparse step.
    FST and SR-STE have no ramp; CAST's is as long as the sparse phase.
    """
    if recipe.regulariser == "masked_l1_decay":
        return recipe.masked_decay * decayed_share(recipe, step, train_iters)
    if recipe.regulariser == "none" or not is_sparse_step(recipe, step, train_iters):
        return 0.0
    ramp = recipe.masked_decay_ramp_iters
    if ramp == 0:
        return recipe.masked_decay
    since = step - sparse_range(recipe, train_iters).start
    return recipe.masked_decay * min(1.0, since / ramp)


def keeps_masks(recipe: SparsityRecipe) -> bool:
    """Whether there are masks, and they never change."""
    return recipe.freeze_masks and recipe.has_mask


def decayed_share(recipe: SparsityRecipe, step: int, train_iters: int) -> float:
    """alpha of CAST (algorithm 1): t / T in the sparse phase of T steps, t from 0; else 0."""
    if not is_sparse_step(recipe, step, train_iters):
        return 0.0
    phase = sparse_range(recipe, train_iters)
    return (step - phase.start) / len(phase)


def refresh_due(
    recipe: SparsityRecipe, step: int, last_refresh: int, first_sparse_step: int = 0
) -> bool:
    """Whether the mask must be computed anew before `step` is computed.

    Refreshes fall on multiples of the interval and on the first sparse step: a mask of the dense
    warm-up only measures flips, and there is one only where they are tracked. Frozen masks are
    searched once, if none came with the weights. Asking twice for one
    step refreshes once, so an evaluation between two steps, or a resume, changes nothing.

    Args:
        last_refresh: step of the latest refresh, or -1.
        first_sparse_step: start of `sparse_range`.
    """
    if keeps_masks(recipe):
        return last_refresh < 0
    interval = recipe.mask_update_interval
    of_dense_phase = last_refresh < first_sparse_step <= step
    return last_refresh < 0 or of_dense_phase or step // interval > last_refresh // interval
