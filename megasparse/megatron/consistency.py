"""Replicas must agree: digests of what several ranks hold alike, compared over DP, TP and PP.

| compared over   | what                                                                        |
|-----------------|-----------------------------------------------------------------------------|
| data parallel   | every parameter, mask and scale of the rank; of experts that these ranks    |
|                 | share, over those with the same ones                                        |
| tensor parallel | parameters that are not sharded, scales, number and step of mask refreshes  |
| pipeline        | tied embeddings: the copies on the first and the last stage                 |

A digest is 64 bits, computed on the device in one pass; what travels is one number a tensor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
import torch.distributed as dist

from megasparse.errors import ReplicaError
from megasparse.fp8.delayed import DelayedScaling
from megasparse.megatron.grid import Grid, is_divided_expert
from megasparse.sparsity.controller import SparsityController

# splitmix64's increment and multipliers, as int64.
_GAMMA, _FACTOR_1, _FACTOR_2 = (
    factor - (1 << 64) for factor in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)
_CHUNK = 1 << 22  # words at a time: bounds the temporary memory to a few times 32 MiB

# A tensor by name, or None where the rank has no such tensor.
Named = list[tuple[str, torch.Tensor | None]]


def digest(tensor: torch.Tensor) -> torch.Tensor:
    """0-d int64 of the tensor's bytes and their order; any single changed word changes it.

    Every 8-byte word passes, with its position, through splitmix64's finaliser, a bijection of 64
    bits; the digest is the sum. No host synchronisation.
    """
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if data.numel() % 8:
        data = torch.nn.functional.pad(data, (0, 8 - data.numel() % 8))
    if data.storage_offset() % 8:
        data = data.clone()
    words = data.view(torch.int64)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, words.numel(), _CHUNK):
        chunk = words[start : start + _CHUNK]
        mixed = torch.arange(start + 1, start + 1 + chunk.numel(), device=tensor.device)
        mixed.mul_(_GAMMA).bitwise_xor_(chunk)
        _xor_shifted(mixed, 30).mul_(_FACTOR_1)
        _xor_shifted(mixed, 27).mul_(_FACTOR_2)
        _xor_shifted(mixed, 31)
        total += mixed.sum()
    return total


def _xor_shifted(value: torch.Tensor, shift: int) -> torch.Tensor:
    """`value ^= value >> shift` with a logical shift; int64's own is arithmetic."""
    return value.bitwise_xor_((value >> shift).bitwise_and_((1 << (64 - shift)) - 1))


def check_replicas(
    model: torch.nn.Module, controller: SparsityController, grid: Grid, step: int
) -> None:
    """Compare all replicas; every rank must call it at the same step.

    Args:
        model: this rank's part, with the whole model's parameter names.

    Raises:
        ReplicaError: on every rank of the run, naming the ranks that differ and their tensors.
    """
    copies = "data" if grid.cp_size == 1 else "data and context"
    comparisons: list[tuple[str, int, dist.ProcessGroup, Callable[[], Named]]] = [
        (copies, grid.dp_cp_size, grid.dp_cp_group, lambda: _data_parallel(model, controller)),
        (
            "expert data",
            grid.expert_replicas.size if grid.ep_size > 1 else 1,
            grid.expert_replicas.group,
            lambda: _data_parallel(model, controller, divided=True),
        ),
        ("tensor", grid.tp_size, grid.tp_group, lambda: _tensor_parallel(model, controller, grid)),
        ("pipeline", grid.pp_size, grid.pp_group, lambda: _tied(model, grid)),
    ]
    found: list[str] = []
    for kind, size, group, tensors in comparisons:
        if size > 1:
            found += [f"{line} ({kind} parallel)" for line in _differences(tensors(), group, grid)]
    if grid.world == 1:
        return
    count = torch.tensor(len(found), device=grid.device)
    dist.all_reduce(count)
    if not count.item():
        return
    everywhere: list[list[str]] = [[] for _ in range(grid.world)]
    dist.all_gather_object(everywhere, found)
    lines = list(dict.fromkeys(line for rank in everywhere for line in rank))
    more = f"; and {len(lines) - 8} more" if len(lines) > 8 else ""
    raise ReplicaError(f"step {step}: replicas differ: {'; '.join(lines[:8])}{more}")


def _data_parallel(
    model: torch.nn.Module, controller: SparsityController, divided: bool = False
) -> Named:
    """Args: divided: of experts that data-parallel ranks share, else of all the rest."""
    named: Named = [(n, p) for n, p in model.named_parameters() if is_divided_expert(p) == divided]
    for state, weight in controller.weights:
        if is_divided_expert(weight) == divided:
            named += [
                (f"mask of {state.name}", state.mask),
                (f"scale of {state.name}", state.scale),
            ]
    return named if divided else named + _fp8(controller)


def _tensor_parallel(model: torch.nn.Module, controller: SparsityController, grid: Grid) -> Named:
    named: Named = [
        (name, getattr(parameter, "ds_tensor", parameter))  # ZeRO 3 keeps a part, equal over TP
        for name, parameter in model.named_parameters()
        if not getattr(parameter, "tensor_model_parallel", False)
    ]
    for state, _ in controller.weights:
        counters = torch.tensor([state.last_refresh, state.refreshes], device=grid.device)
        named += [
            (f"scale of {state.name}", state.scale),
            (f"refresh counters of {state.name}", counters),
        ]
    return named + _fp8(controller)


def _fp8(controller: SparsityController) -> Named:
    scales = controller.fp8
    if not isinstance(scales, DelayedScaling):
        return []  # none, or current scaling: no state
    return [("FP8 scales", scales.scale), ("FP8 history", scales.history)]


def _tied(model: torch.nn.Module, grid: Grid) -> Named:
    """The word embeddings of the first and last stage, unless the last has an output layer."""
    name = "embedding.word_embeddings.weight"
    return [(name, dict(model.named_parameters()).get(name))]


def _differences(named: Named, group: dist.ProcessGroup, grid: Grid) -> list[str]:
    """One line a rank and tensor that is unlike most of its group (of equals: unlike the first)."""
    if not named:
        return []
    # 0 stands for "not here", for which no tensor is a replica.
    mine = torch.stack(
        [
            torch.zeros((), dtype=torch.int64, device=grid.device) if t is None else digest(t)
            for _, t in named
        ]
    )
    ranks = dist.get_process_group_ranks(group)
    table = torch.empty(len(ranks) * len(named), dtype=torch.int64, device=grid.device)
    dist.all_gather_into_tensor(table, mine, group=group)
    columns = table.view(len(ranks), len(named)).t().tolist()
    lines = []
    for (name, _), digests in zip(named, columns, strict=True):
        present = {rank: value for rank, value in zip(ranks, digests, strict=True) if value}
        counts = Counter(present.values())
        if len(counts) < 2:
            continue
        usual = counts.most_common(1)[0][0]  # of equally frequent ones the first rank's
        like = next(rank for rank, value in present.items() if value == usual)
        for rank, value in present.items():
            if value != usual:
                lines.append(f"{name} on rank {rank} differs from rank {like}'s")
    return lines
