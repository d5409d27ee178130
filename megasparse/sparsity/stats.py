"""What is reported about the layers that are sparse or in FP8, from sums that ranks can add up.

A rank measures three small matrices, layers by figures, without waiting for its device; ranks add
them up (or take the largest), and `layer_figures` turns the totals into ratios. Layers are those of
this rank's pipeline stage.

| figure             | definition                                                                |
|--------------------|---------------------------------------------------------------------------|
| flip_rate          | entries that the last mask refresh changed / all entries (FST, section 4) |
| density            | non-zeros of W~ as the GEMMs use it / all entries; 1 in dense phases      |
| retained_l1        | sum |W o M| / sum |W|                                                     |
| double_pruned      | |W~ - W~_d|^2 / |W~|^2: the share of W~'s squares that grad_input lacks   |
| scale              | beta of S-STE; of experts the largest                                     |
| masked_decay       | the weight's own lambda of the next step, if it follows second moments    |
| decay_ratio        | norm of lambda (1 - M) o W / norm of the gradient that it meets           |
| mvue_amplification | sum of squares of MVUE(dZ) / sum of squares of dZ, over the micro-batches |
| mvue_variance      | E|MVUE(dZ) - dZ|^2 / |dZ|^2, over the micro-batches; without a draw       |
| fp8_amax_*         | largest magnitude of an operand before it is scaled                       |
| fp8_saturated_*    | share of an operand's entries rounded to the format's largest value       |
| fp8_lost_*         | share of an operand's entries that were not zero and became it            |
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from megasparse.errors import KernelError, NumericsError
from megasparse.kernels import tensor_figures
from megasparse.sparsity.dense_weight import DenseFp8Weight
from megasparse.sparsity.probe import NOTHING, OPERANDS, STEP_SUMS
from megasparse.sparsity.projection import double_pruned
from megasparse.sparsity.state import SparseWeight

# Of the weight: the same on all data-parallel ranks. (Of STEP_SUMS every rank has its part.)
WEIGHT_SUMS = (
    "flips", "nonzeros", "numel", "kept", "magnitude", "square", "square_lost", "nan", "not_24",
)  # fmt: skip
MAXIMA = ("scale", "masked_decay", *OPERANDS)


@dataclass
class Measured:
    """This rank's sums.

    Attributes:
        names: of the layers.
        flips_known: whether a layer's mask was refreshed twice at least.
        weight_sums: float64 (layers, WEIGHT_SUMS).
        step_sums: float64 (layers, STEP_SUMS).
        maxima: float32 (layers, MAXIMA).
    """

    names: list[str]
    flips_known: list[bool]
    weight_sums: torch.Tensor
    step_sums: torch.Tensor
    maxima: torch.Tensor


def measure(
    weights: list[tuple[SparseWeight, torch.nn.Parameter]],
    sparse_now: bool,
    device: torch.device,
    dense: list[tuple[DenseFp8Weight, torch.nn.Parameter]],
    whole: Callable[[list[torch.nn.Parameter]], Any] = lambda _: contextlib.nullcontext(),
) -> Measured:
    """Sums of all layers, on the device.

    Args:
        weights: states of sparse weights with their parameters.
        sparse_now: whether GEMMs use the pruned weights.
        device: where the sums are; for a stage without such layers.
        dense: weights of dense FP8 layers, which have figures of FP8 alone; they come last.
        whole: makes a context in which parameters can be read (ZeRO 3 gathers them).
    """
    nothing = torch.zeros(len(STEP_SUMS), dtype=torch.float64, device=device)
    missing = torch.full((len(OPERANDS),), NOTHING, device=device)
    weight_sums, step_sums, maxima = [], [], []
    for state, weight in weights:
        with whole([weight]):
            weight_sums.append(_weight_sums(state, weight.detach(), sparse_now))
    weight_sums += [nothing.new_zeros(len(WEIGHT_SUMS))] * len(dense)
    owners: list[SparseWeight | DenseFp8Weight] = [
        *(state for state, _ in weights),
        *(one for one, _ in dense),
    ]
    for one in owners:
        probe = one.probe
        step_sums.append(nothing if probe.totals is None else probe.totals)
        largest = missing if probe.largest is None else probe.largest
        beta = one.scale if isinstance(one, SparseWeight) else None
        scale = missing[0] if beta is None else beta.float().max()
        own = one.decay if isinstance(one, SparseWeight) and sparse_now else None
        decay = missing[0] if own is None else own.value
        maxima.append(torch.cat([torch.stack([scale, decay]), largest]))
    flips = [state.flips is not None for state, _ in weights]
    return Measured(
        [one.name for one in owners],
        flips + [False] * len(dense),
        torch.stack(weight_sums) if owners else nothing.new_zeros(0, len(WEIGHT_SUMS)),
        torch.stack(step_sums) if owners else nothing.new_zeros(0, len(STEP_SUMS)),
        torch.stack(maxima) if owners else missing.new_zeros(0, len(MAXIMA)),
    )


def _weight_sums(state: SparseWeight, weight: torch.Tensor, sparse_now: bool) -> torch.Tensor:
    """float64 (WEIGHT_SUMS,) of one weight; W and W~ are read once each."""
    # Without monitoring the step after a dense warm-up is the first to have a mask.
    known = state.mask is not None or not state.now.has_mask
    pruned = sparse_now and known
    used = state.effective(weight) if pruned else weight
    of_weight = tensor_figures(weight)
    of_used = tensor_figures(used) if pruned else of_weight
    nothing = torch.zeros_like(of_weight.square)
    kept = nothing
    if state.mask is not None and sparse_now and state.now.has_mask:
        kept = of_used.magnitude
    elif state.mask is not None:
        kept = tensor_figures(weight.masked_fill(~state.mask, 0.0)).magnitude
    square = lost = nothing
    if pruned and state.now.double_pruned:
        square = of_used.square
        lost = tensor_figures(used - double_pruned(used, state._nan_flag)).square
    sums = (
        nothing if state.flips is None else state.flips.double(),
        of_used.nonzeros,
        torch.full_like(nothing, weight.numel()),
        kept,
        of_weight.magnitude,
        square,
        lost,
    )
    return torch.cat([torch.stack(sums), state.flags(weight.device)])


def layer_figures(
    measured: Measured,
    weight_sums: list[list[float]],
    step_sums: list[list[float]],
    maxima: list[list[float]],
) -> dict[str, dict[str, float]]:
    """Figures by layer, from the totals of all ranks; what was not measured is left out.

    Raises:
        NumericsError: a NaN was found in a weight while it was pruned.
        KernelError: an operand was not 2:4.
    """
    figures = {}
    rows = zip(measured.names, measured.flips_known, weight_sums, step_sums, maxima, strict=True)
    for name, flips_known, of_weight, of_step, largest in rows:
        w = dict(zip(WEIGHT_SUMS, of_weight, strict=True))
        s = dict(zip(STEP_SUMS, of_step, strict=True))
        if w["nan"]:
            raise NumericsError(f"NaN in the weight {name}, found while it was pruned")
        if w["not_24"]:
            raise KernelError(f"an operand packed for {name} was not 2:4")
        one = {"density": w["nonzeros"] / w["numel"]} if w["numel"] else {}
        if flips_known:
            one["flip_rate"] = w["flips"] / w["numel"]
        if w["magnitude"] and w["kept"]:
            one["retained_l1"] = w["kept"] / w["magnitude"]
        if w["square"]:
            one["double_pruned"] = w["square_lost"] / w["square"]
        if s["gradient"] and s["decay"]:
            one["decay_ratio"] = (s["decay"] / s["gradient"]) ** 0.5
        if s["mvue_before"]:
            one["mvue_amplification"] = s["mvue_after"] / s["mvue_before"]
            one["mvue_variance"] = s["mvue_variance"] / s["mvue_before"]
        for operand in OPERANDS:
            if s[f"fp8_{operand}_all"]:
                total = s[f"fp8_{operand}_all"]
                one[f"fp8_saturated_{operand}"] = s[f"fp8_{operand}_largest"] / total
                one[f"fp8_lost_{operand}"] = s[f"fp8_{operand}_lost"] / total
        for figure, value in zip(MAXIMA, largest, strict=True):
            if value != NOTHING:
                one[f"fp8_amax_{figure}" if figure in OPERANDS else figure] = value
        figures[name] = one
    return figures
