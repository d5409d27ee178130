"""Initial weights that do not depend on the layout.

Every parameter draws from a generator of its own, seeded by (run seed, name), as a whole; a rank
keeps its shard. So tensor-, pipeline- and data-parallel layouts start from the same model.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel import layers

from megasparse.sparsity.shard import WeightShard

# What DeepSpeed calls the groups of ranks with the same experts.
EXPERTS = "experts"


def parameter_shard(parameter: torch.Tensor, tp_rank: int, tp_size: int) -> WeightShard:
    """Where a parameter of this rank lies in the whole, from Megatron's marks on it."""
    # ZeRO 3 keeps a parameter empty between uses, and its shape aside.
    shape = list(getattr(parameter, "ds_shape", parameter.shape))
    block, blocks = getattr(parameter, "expert_block", (0, 1))
    if blocks > 1:
        shape[0] *= blocks
    if tp_size == 1 or not getattr(parameter, "tensor_model_parallel", False):
        return WeightShard(tuple(shape), block=block, blocks=blocks)
    dim = parameter.partition_dim  # type: ignore[attr-defined]
    shape[dim] *= tp_size
    parts = getattr(parameter, "partition_stride", 1)
    return WeightShard(tuple(shape), dim, tp_rank, tp_size, parts, block, blocks)


@torch.no_grad()
def initialize_weights(
    model: torch.nn.Module, seed: int, std: float, num_layers: int, tp_rank: int, tp_size: int
) -> None:
    """Fill all parameters: GPT-2's rules (Radford et al., 2019, section 2.3).

    Norm weights 1, biases 0, matrices normal with `std`; those that write to the residual stream
    (`linear_proj`, `linear_fc2`) `std / sqrt(2 * num_layers)`. Each is drawn whole, in float32,
    from the seed and its name, and then cut: every layout gets the same model.

    Args:
        model: whole, or a pipeline stage with the whole's names.
        seed: of the run.
        std: standard deviation of the matrices.
        num_layers: of the whole model.
        tp_rank, tp_size: place in the tensor-parallel group.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
            continue
        shard = parameter_shard(parameter, tp_rank, tp_size)
        writes_residual = "linear_proj" in name or "linear_fc2" in name
        scale = std / math.sqrt(2 * num_layers) if writes_residual else std
        here = getattr(parameter, "experts_here", None)
        if here is None:
            whole = _drawn(f"{seed}:{name}", shard.global_shape, scale, parameter.device)
            parameter.copy_(shard.slice_of(whole))
            continue
        # An expert is drawn by itself: no rank holds those of all others, not even for a moment.
        rows = shard.global_shape[0] // (here * shard.blocks)
        own = WeightShard(
            (rows, shard.global_shape[1]),
            shard.dim,
            shard.rank,
            shard.world,
            shard.parts // here if shard.dim == 0 else 1,
        )
        for number, part in enumerate(parameter.unflatten(0, (here, -1))):
            key = f"{seed}:{name}:{shard.block * here + number}"
            part.copy_(own.slice_of(_drawn(key, own.global_shape, scale, parameter.device)))


def _drawn(key: str, shape: tuple[int, ...], std: float, device: torch.device) -> torch.Tensor:
    """float32, normal, of a generator that the key seeds."""
    digest = hashlib.sha256(key.encode()).digest()
    generator = torch.Generator(device)
    generator.manual_seed(int.from_bytes(digest[:7], "little"))
    whole = torch.empty(shape, dtype=torch.float32, device=device)
    return whole.normal_(0.0, std, generator=generator)


def initialize_by(
    weight: torch.nn.Parameter, shard: WeightShard, init_method: Callable[..., Any], config: Any
) -> None:
    """Fill a weight as megatron-core's own linears do, with the same numbers, and mark it."""
    if not config.use_cpu_initialization:
        dim, parts = shard.dim, shard.parts
        layers._initialize_affine_weight_gpu(weight, init_method, partition_dim=dim, stride=parts)
        return
    rows, columns = shard.global_shape
    layers._initialize_affine_weight_cpu(
        weight,
        rows,
        columns,
        shard.global_shape[shard.dim or 0] // shard.world,
        shard.dim,
        init_method,
        stride=shard.parts,
        rank=shard.rank,
        world_size=shard.world,
    )


def mark_sharded(parameter: torch.nn.Parameter, shard: WeightShard) -> None:
    """Megatron's marks, which DeepSpeed reads too (gradient norms count sharded entries once)."""
    parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
    parameter.partition_dim = shard.dim  # type: ignore[attr-defined]
    parameter.partition_stride = shard.parts  # type: ignore[attr-defined]


def mark_experts(parameter: torch.nn.Parameter, here: int, block: int, blocks: int) -> None:
    """Mark the stacked weights of experts.

    Args:
        here: experts that are stacked on this rank.
        block, blocks: which of how many expert-parallel ranks this is. Above 1 the gradient is
            summed over the ranks with the same experts alone: Megatron's and DeepSpeed's mark.
    """
    parameter.experts_here = here  # type: ignore[attr-defined]
    parameter.expert_block = (block, blocks)  # type: ignore[attr-defined]
    if blocks > 1:
        parameter.allreduce = False  # type: ignore[attr-defined]
        parameter.group_name = EXPERTS  # type: ignore[attr-defined]
