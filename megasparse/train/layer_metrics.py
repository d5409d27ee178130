"""Metrics of all layers from what each rank measured: two small reductions and one read.

A rank's sums are added up over the ranks that share a layer (tensor parallel) and that see other
samples (data parallel); pipeline stages hand over their layers.
"""

from __future__ import annotations

import resource
from typing import Any

import torch
import torch.distributed as dist

from megasparse.megatron.grid import Grid, is_divided_expert
from megasparse.sparsity.controller import SparsityController
from megasparse.sparsity.probe import OPERANDS
from megasparse.sparsity.stats import MAXIMA, STEP_SUMS, WEIGHT_SUMS, layer_figures, measure
from megasparse.train.engine.base import Engine

LayerMetrics = dict[str, dict[str, float]]
MEANS = (
    "density", "retained_l1", "double_pruned", "decay_ratio", "mvue_amplification",
    "mvue_variance", "scale",
)  # fmt: skip


def measure_all(
    engine: Engine, sparse: bool, more: list[float], largest: float
) -> tuple[LayerMetrics, list[float], float]:
    """Everything that is known of the layers, and values of ranks; a collective call.

    Args:
        sparse: whether the step that is measured is in the sparse phase.
        more: values to be added up over all ranks.
        largest: a value of which the largest is wanted.

    Returns:
        LayerMetrics by layer of the whole model in order, the sums of `more`, and the largest.
    """
    controller, grid = engine.controller, engine.grid
    measured = measure(
        controller.weights, sparse, grid.device, controller.dense, engine.layout.gathered_parameters
    )
    count = len(measured.names)
    if grid.dp_cp_size > 1:
        dist.all_reduce(measured.step_sums, group=grid.dp_cp_group)
        dist.all_reduce(measured.maxima, op=dist.ReduceOp.MAX, group=grid.dp_cp_group)
    _sum_over_experts(measured.weight_sums, controller, grid)
    sums = grid.sum_over_tp(torch.cat([measured.weight_sums, measured.step_sums], 1))
    maxima = grid.max_over_tp(measured.maxima)
    of_ranks = torch.tensor(more, dtype=torch.float64, device=grid.device)
    peak = torch.tensor([largest], dtype=torch.float64, device=grid.device)
    if grid.world > 1:
        dist.all_reduce(of_ranks)
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    # The one read of a log step.
    values = torch.cat([sums.flatten(), maxima.double().flatten(), of_ranks, peak]).tolist()
    width, split = len(WEIGHT_SUMS) + len(STEP_SUMS), len(WEIGHT_SUMS)
    rows = [values[i * width : (i + 1) * width] for i in range(count)]
    rest = values[count * width :]
    tops = [rest[i * len(MAXIMA) : (i + 1) * len(MAXIMA)] for i in range(count)]
    rest = rest[count * len(MAXIMA) :]
    metrics = layer_figures(
        measured, [row[:split] for row in rows], [row[split:] for row in rows], tops
    )
    return _over_stages(metrics, grid), rest[:-1], rest[-1]


def flip_rates(controller: SparsityController, grid: Grid) -> LayerMetrics:
    """Flip rates alone, after a mask refresh between two log steps; a collective call."""
    weights = controller.weights
    none = torch.zeros((), dtype=torch.int64, device=grid.device)
    counts = [none if state.flips is None else state.flips for state, _ in weights]
    totals: list[int] = []
    if weights:
        table = _sum_over_experts(torch.stack(counts)[:, None], controller, grid)
        totals = grid.sum_over_tp(table.flatten()).tolist()
    metrics: LayerMetrics = {}
    for (state, _), flips in zip(weights, totals, strict=True):
        rows, columns = state.shard.global_shape
        metrics[state.name] = {} if state.flips is None else {"flip_rate": flips / (rows * columns)}
    return _over_stages(metrics, grid)


def _sum_over_experts(
    table: torch.Tensor, controller: SparsityController, grid: Grid
) -> torch.Tensor:
    """Add up, in place, the rows of weights whose experts are divided over ranks."""
    rows = [n for n, (_, weight) in enumerate(controller.weights) if is_divided_expert(weight)]
    if rows:
        table[rows] = grid.sum_over_ep(table[rows])
    return table


def entries(controller: SparsityController, grid: Grid) -> dict[str, int]:
    """Entries of every sparse weight of the whole model, by layer; a collective call."""
    shapes = {state.name: state.shard.global_shape for state, _ in controller.weights}
    here = {name: {"entries": float(rows * columns)} for name, (rows, columns) in shapes.items()}
    return {name: int(one["entries"]) for name, one in _over_stages(here, grid).items()}


def run_flip_rate(metrics: LayerMetrics, entries: dict[str, int]) -> float | None:
    """All flips over all entries (FST, section 4), which is not the mean of the layers' rates.

    Args:
        entries: of each layer's weight.
    """
    rates = {name: one["flip_rate"] for name, one in metrics.items() if "flip_rate" in one}
    if not rates:
        return None
    flips = sum(round(rate * entries[name]) for name, rate in rates.items())
    return flips / sum(entries[name] for name in rates)


def summary(metrics: LayerMetrics, entries: dict[str, int]) -> dict[str, float]:
    """The run's metrics: flips over entries, the worst for FP8, else the mean over layers.

    Args:
        entries: of each layer's weight.
    """
    row = {}
    if (rate := run_flip_rate(metrics, entries)) is not None:
        row["flip_rate"] = rate
    for metric in MEANS:
        values = [one[metric] for one in metrics.values() if metric in one]
        if values:
            row[metric] = sum(values) / len(values)
    for metric in ("amax", "saturated", "lost"):
        values = [
            one[key]
            for one in metrics.values()
            for key in (f"fp8_{metric}_{operand}" for operand in OPERANDS)
            if key in one
        ]
        if values:
            row[f"fp8_{metric}"] = max(values)
    return row


def peak_memory_gib(device: torch.device) -> float:
    """Most memory so far: allocated by torch on a GPU, resident of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _over_stages(metrics: LayerMetrics, grid: Grid) -> LayerMetrics:
    stages: list[Any] = grid.gather_over_pp(metrics)
    return {name: one for stage in stages for name, one in stage.items()}
