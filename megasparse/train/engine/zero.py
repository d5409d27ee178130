"""DeepSpeed's ZeRO: where it keeps the pieces of the parameters, and what precedes its update."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from megasparse.megatron.grid import Grid, is_divided_expert
from megasparse.optim.fragments import Fragment

# What the norm is taken of, given a parameter and its gradient.
Measured = Callable[[torch.nn.Parameter, torch.Tensor], torch.Tensor]


def gradient_alone(_: torch.nn.Parameter, gradient: torch.Tensor) -> torch.Tensor:
    """What the norm is usually taken of."""
    return gradient


def is_copy(parameter: torch.nn.Parameter) -> bool:
    """Whether a tied parameter is the copy on a later stage (DeepSpeed's mark)."""
    return getattr(parameter, "ds_pipe_replicated", False)


def global_norm(
    gradients: Iterable[tuple[torch.nn.Parameter, torch.Tensor]],
    grid: Grid,
    over_dp_cp: bool = False,
    measured: Measured = gradient_alone,
) -> torch.Tensor:
    """0-d float32: the norm of the whole model's gradient, the same on every rank.

    Entries that are sharded over tensor-parallel ranks, or over the ranks that share experts, count
    once each, replicated ones once, tied ones once.

    Args:
        gradients: this rank's parameters with their gradients, or the pieces that it holds.
        over_dp_cp: the pieces are divided over the ranks that hold the same part of the model.
        measured: what of each counts.
    """
    shared: list[torch.Tensor] = []
    experts: list[torch.Tensor] = []
    for parameter, gradient in gradients:
        sharded = getattr(parameter, "tensor_model_parallel", False)
        if not is_copy(parameter) and (sharded or grid.tp_rank == 0):
            kind = experts if is_divided_expert(parameter) else shared
            kind.append(measured(parameter, gradient))
    total = _squares(shared, grid)
    if over_dp_cp:
        total = grid.sum_over_dp_cp(total + _squares(experts, grid))
    elif grid.ep_size > 1:
        total = total + grid.sum_over_ep(_squares(experts, grid))
    return grid.sum_over_model(total).sqrt()


def _squares(gradients: list[torch.Tensor], grid: Grid) -> torch.Tensor:
    """0-d float32: the sum of all their squares."""
    if not gradients:
        return torch.zeros((), device=grid.device)
    norms = torch._foreach_norm(gradients, 2, dtype=torch.float32)
    return torch.stack(norms).square().sum()


def sum_replicated(
    gradients: Iterable[tuple[torch.nn.Parameter, torch.Tensor]], grid: Grid
) -> None:
    """Under sequence parallelism, sum gradients of replicated parameters over TP, in place.

    Each rank sees a part of the sequence, so its gradient of a norm or a row-parallel bias is a
    partial sum. All in one collective, once an optimizer step.

    Args:
        gradients: final but for this; the same parameters, or pieces of them, on the ranks of a TP
            group.
    """
    partial = [grad for param, grad in gradients if getattr(param, "sequence_parallel", False)]
    if not partial:
        return
    whole = grid.sum_over_tp(torch.cat([gradient.reshape(-1) for gradient in partial]))
    pieces = whole.split([gradient.numel() for gradient in partial])
    torch._foreach_copy_(partial, [p.view_as(g) for p, g in zip(pieces, partial, strict=True)])


def install_norm(optimizer: Any, grid: Grid, measured: Measured = gradient_alone) -> None:
    """Make ZeRO finish its gradients by `sum_replicated`, and clip by `global_norm`.

    DeepSpeed's own norm sums every parameter group over the model-parallel ranks, which hangs when
    pipeline stages have different groups (a middle stage may have no dense matrix).
    """

    def norm_of_partitions() -> list[torch.Tensor]:
        pieces: list[tuple[torch.nn.Parameter, torch.Tensor]] = []
        for number, parameters in enumerate(optimizer.fp16_groups):
            pieces += zip(parameters, optimizer.averaged_gradients[number], strict=True)
        sum_replicated(pieces, grid)
        return [global_norm(pieces, grid, over_dp_cp=True, measured=measured)]

    def norm(norm_type: int = 2) -> torch.Tensor:
        pieces: list[tuple[torch.nn.Parameter, torch.Tensor]] = []
        for number in range(len(optimizer.bit16_groups)):
            gradients = [
                g for g in optimizer.averaged_gradients[number] if not hasattr(g, "_zero_padding")
            ]
            pieces += zip(optimizer.params_in_partition[number], gradients, strict=True)
        sum_replicated(pieces, grid)
        return global_norm(pieces, grid, over_dp_cp=True, measured=measured)

    if is_partitioned(optimizer):
        optimizer._get_norm_groups = norm_of_partitions
    else:
        optimizer.scaled_global_norm = norm
        # A norm that is not finite is an overflow to DeepSpeed too. Its own check before that looks
        # at one gradient after the other, several launches each.
        optimizer.check_overflow = lambda partition_gradients=True: None


def is_partitioned(optimizer: Any) -> bool:
    """Whether DeepSpeed's optimizer is ZeRO 3's, which keeps a part of every parameter alone."""
    return hasattr(optimizer, "fp32_partitioned_groups_flat")


def partition(parameter: torch.nn.Parameter) -> torch.Tensor | None:
    """This rank's part of a parameter under ZeRO 3, 1-D, padded to equal length on all ranks.

    None: the parameter is whole on every rank.
    """
    return getattr(parameter, "ds_tensor", None)


def put_partition(parameter: torch.nn.Parameter, values: torch.Tensor) -> None:
    """Replace the first entries of this rank's part of a parameter under ZeRO 3.

    A whole copy of it, which DeepSpeed keeps of small parameters, is dropped, and made anew from
    the parts when it is needed.
    """
    part = partition(parameter)
    assert part is not None
    part.view(-1)[: values.numel()].copy_(values)
    parameter.partition()  # type: ignore[attr-defined]


def partition_fragments(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]], optimizer: Any, rank: int
) -> list[Fragment]:
    """The pieces that ZeRO 3's optimizer holds on this rank, one of every parameter.

    Args:
        optimizer: DeepSpeed's. Its flat float32 tensors hold the parts of `fp16_groups` in order.
        rank: among those that hold the same part of the model.
    """
    names = {id(parameter): name for name, parameter in named_parameters}
    found = []
    for flat, parameters in zip(
        optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True
    ):
        offset = 0
        for parameter in parameters:
            padded = parameter.partition_numel()
            start = rank * padded
            length = min(padded, parameter.ds_numel - start)
            if length > 0:
                name = names[id(parameter)]
                found.append(Fragment(name, parameter, flat, offset, start, length))
            offset += padded
    return found


def fragments(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]], optimizer: torch.optim.Optimizer
) -> list[Fragment]:
    """The pieces of the parameters that this rank's optimizer holds.

    Args:
        named_parameters: of the model.
        optimizer: the base optimizer. Without ZeRO its tensors are the parameters; ZeRO 1 and 2
            give it one flat float32 shard a group, and note on each parameter (`_hp_mapping`)
            which part of the parameter lies where in it.
    """
    tensors = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    own = {id(tensor): tensor for tensor in tensors}
    by_storage = {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors}
    found = []
    for name, parameter in named_parameters:
        if id(parameter) in own:
            found.append(Fragment(name, parameter, parameter, 0, 0, parameter.numel()))
            continue
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is None:
            continue  # another rank's
        piece = mapping.get_hp_fragment()
        flat = by_storage[piece.untyped_storage().data_ptr()]
        address = mapping.lp_fragment_address
        found.append(
            Fragment(
                name,
                parameter,
                flat,
                piece.storage_offset() - flat.storage_offset(),
                address.start,
                address.numel,
            )
        )
    return found
