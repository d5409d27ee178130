"""Learnable scales of a weight: a few numbers a row that undo what a decay takes away (CAST).

    W~ = A o W        A (N, n): entry (r, c) is multiplied by A[r, c // (K / n)], n groups of inputs

A decay that drives half of the weights to zero shrinks the others too; a scale grows in one step
what thousands of steps of a small rate would have to. Within a group of four all entries have the
same scale, so the mask of `A o W` is that of W, and afterwards A is multiplied into W for good.
"""

from __future__ import annotations

import dataclasses

import torch

from megasparse.errors import ConfigError
from megasparse.sparsity.shard import WeightShard


def scale_shard(weight: WeightShard, groups: int) -> WeightShard:
    """Where the local A lies in the whole `(N, n)`: split with the rows, or with the inputs.

    Raises:
        ConfigError: groups cut fours of inputs, or are cut by the ranks.
    """
    rows, columns = weight.global_shape
    if columns % (4 * groups):
        raise ConfigError(
            f"weight_scale_groups {groups} of a weight of {columns} inputs, expected groups of a "
            "multiple of 4"
        )
    if weight.dim == 1 and groups % weight.world:
        raise ConfigError(
            f"weight_scale_groups {groups} with tensor_model_parallel_size {weight.world}, "
            "expected a multiple of it: inputs of row-parallel layers are split over the ranks"
        )
    return dataclasses.replace(weight, global_shape=(rows, groups))


def scaled(w_NK: torch.Tensor, a_NG: torch.Tensor) -> torch.Tensor:
    """`A o W` `(N, K)`, with autograd."""
    return (w_NK.unflatten(1, (a_NG.shape[1], -1)) * a_NG.unsqueeze(-1)).flatten(1)
