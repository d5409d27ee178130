"""What a sparse linear has beside its weight: SLoRB's low-rank branch (AST), scales (CAST)."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megasparse.kernels import prune24_mask
from megasparse.megatron.comm.slorb import SplitOverRank, SumOfProjections
from megasparse.megatron.init import mark_sharded
from megasparse.sparsity.shard import WeightShard
from megasparse.sparsity.slorb import (
    LocalLowRankComm,
    LowRankBranch,
    LowRankComm,
    adapter_shard,
    initial_adapter,
    initial_projection,
    projection_shard,
)
from megasparse.sparsity.weight_scale import scale_shard, scaled


class AddedParameters(torch.nn.Module):
    """The part of a parallel linear that adds to its weight.

    Attributes:
        weight: local master weight `(N_local, K_local)`.
        shard: where it lies in the whole.
        tp_group: of tensor parallelism.
        slorb_adapter, slorb_projection: S and P of SLoRB, or None.
        weight_scale: A of CAST, or None.
    """

    weight: torch.nn.Parameter
    shard: WeightShard
    tp_group: dist.ProcessGroup

    def __init__(self) -> None:
        super().__init__()
        self._branch: LowRankBranch | None = None
        self.weight_scale: torch.nn.Parameter | None = None
        self.slorb_adapter: torch.nn.Parameter | None = None
        self.slorb_projection: torch.nn.Parameter | None = None

    def scaled_weight(self) -> torch.Tensor:
        """The weight with its scales, if it has any; with autograd."""
        return self.weight if self.weight_scale is None else scaled(self.weight, self.weight_scale)

    def add_low_rank_branch(self, group_size: int, trained_projection: bool) -> None:
        """Give a sparse layer SLoRB's low-rank branch; `initial_low_rank_weights` says with what.

        Raises:
            ConfigError: `group_size` does not divide the shard's inputs.
        """
        comm: LowRankComm = LocalLowRankComm()
        if self.tp_group.size() > 1 and trained_projection:
            kind = SplitOverRank if self.shard.dim == 1 else SumOfProjections
            comm = kind(self.tp_group)
        self._branch = LowRankBranch(group_size, comm)
        shards = [adapter_shard(self.shard, group_size)]
        if trained_projection:
            shards.append(projection_shard(self.shard, group_size))
        made = []
        for shard in shards:
            made.append(torch.nn.Parameter(self.weight.detach().new_zeros(shard.local_shape)))
            if shard.dim is not None:
                mark_sharded(made[-1], shard)
        self.slorb_adapter = made[0]
        self.slorb_projection = made[1] if trained_projection else None
        self._group_size = group_size

    def add_weight_scale(self, groups: int) -> None:
        """Give a sparse layer CAST's learnable scales; they begin with 1.

        Raises:
            ConfigError: the groups do not fit the shard.
        """
        shard = scale_shard(self.shard, groups)
        self.weight_scale = torch.nn.Parameter(self.weight.detach().new_ones(shard.local_shape))
        if shard.dim is not None:
            mark_sharded(self.weight_scale, shard)

    def initial_low_rank_weights(self) -> list[tuple[torch.nn.Parameter, torch.Tensor]]:
        """The branch's parameters with the values that keep every group's sum of the weight."""
        if self.slorb_adapter is None:
            return []
        weight = self.weight.detach()
        adapter = initial_adapter(weight, prune24_mask(weight), self._group_size)
        values = [(self.slorb_adapter, adapter)]
        if self.slorb_projection is not None:
            shard = projection_shard(self.shard, self._group_size)
            values.append((self.slorb_projection, initial_projection(shard, self._group_size)))
        return values
