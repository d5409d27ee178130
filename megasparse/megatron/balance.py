"""The losses that keep experts balanced: how much they weigh in a step, and what they were.

megasparse asks megatron-core's router for them: it adds their gradients in the backward pass, by a
factor, and adds up their values, layer by layer, in a table.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    clear_aux_losses_tracker,
    get_moe_layer_wise_logging_tracker,
)

from megasparse.megatron.grid import Grid

# What megatron-core calls a loss, and the metric of it.
LOSSES = {
    "load_balancing_loss": "load_balancing_loss",
    "seq_load_balancing_loss": "load_balancing_loss",
    "z_loss": "z_loss",
}


def begin_step(micro_batches: int, context: int = 1) -> None:
    """Before the first forward pass of an optimizer step.

    Args:
        micro_batches: of a rank; the loss of the step is the mean over them.
        context: ranks of context parallelism, each of which has a part of a micro-batch's losses,
            and over which gradients are averaged.
    """
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(context / micro_batches))
    clear_aux_losses_tracker()


def losses_of_step(grid: Grid, layers: int, micro_batches: int) -> dict[str, float]:
    """The losses of the step, without their coefficients, as means over layers and micro-batches.

    Args:
        layers: with experts, of the whole model.
        micro_batches: of a rank.

    Returns:
        The same on every rank; a collective call. Empty where no loss is asked for.
    """
    tracker = get_moe_layer_wise_logging_tracker()
    names = sorted(set(LOSSES.values()))
    sums = torch.zeros(len(names), 2, dtype=torch.float64, device=grid.device)
    for name, entry in tracker.items():
        # Of a balance every rank that shares a micro-batch has its part; the mean of the others is
        # taken.
        parts = entry.get("reduce_group") is not None
        whole = float(grid.cp_size) if parts else 1.0 / grid.tp_size
        row = sums[names.index(LOSSES[name])]
        row[0] += entry["values"].double().sum() * whole
        row[1] += 1
    grid.sum_over_model(sums)
    grid.sum_over_dp_cp(sums)
    total = layers * micro_batches * grid.dp_cp_size
    return {
        name: value / total
        for name, (value, known) in zip(names, sums.tolist(), strict=True)
        if known
    }
