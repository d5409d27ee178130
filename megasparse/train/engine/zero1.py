"""ZeRO 1 on flat gradients: one reduction a group, one norm, one update.

DeepSpeed's own copies every gradient into a bucket, reduces the bucket, flattens this rank's part,
converts it and clips it: six passes over the gradients and hundreds of launches. Here gradients are
added up in the order in which DeepSpeed's ZeRO 1 has flattened the parameters
(`gradients.py`), so that a rank's part is a slice. The parameters' flat tensors, the optimizer's
float32 shards and their checkpoints stay DeepSpeed's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from megasparse.megatron.grid import Grid
from megasparse.optim.fragments import Fragment
from megasparse.train.engine.gradients import GradientBuffers
from megasparse.train.engine.step_guard import StepGuard
from megasparse.train.engine.zero import Measured, global_norm, sum_replicated

# Newer versions of torch call it differently, and warn of the old name.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def zero1_buffers(optimizer: Any, dtype: torch.dtype) -> GradientBuffers:
    """Buffers in the order of DeepSpeed's flat parameters, padding included.

    Args:
        optimizer: DeepSpeed's, of ZeRO 1.
        dtype: in which gradients are added up.
    """
    groups = []
    for flat, parameters in zip(optimizer.bit16_groups_flat, optimizer.bit16_groups, strict=True):
        base, size = flat.data_ptr(), flat.element_size()
        groups.append({p: (p.data_ptr() - base) // size for p in parameters})
    return GradientBuffers(groups, [flat.numel() for flat in optimizer.bit16_groups_flat], dtype)


class Zero1:
    """Takes the place of a ZeRO 1 optimizer's reduction and update.

    Args:
        optimizer: DeepSpeed's, of ZeRO 1; its methods are replaced.
        gradients: from `zero1_buffers`.
        grid: this rank's place.
        clip_grad: limit of the gradient's norm; 0: none.
        measured: what of a gradient the norm is taken of.
        guard: knows whether the step's loss is finite.

    Attributes:
        fragments: where the parameters lie in the optimizer's tensors; to be set.
    """

    def __init__(
        self,
        optimizer: Any,
        gradients: GradientBuffers,
        grid: Grid,
        clip_grad: float,
        measured: Measured,
        guard: StepGuard,
    ) -> None:
        self._zero, self._gradients, self._grid = optimizer, gradients, grid
        self._clip_grad, self._measured, self._guard = clip_grad, measured, guard
        self.fragments: Sequence[Fragment] = ()
        # A group has experts alone, or none; the ranks that hold the same experts are fewer.
        self._replicas = [grid.replicas_of(parameters[0]) for parameters in optimizer.bit16_groups]
        sizes = map(int, optimizer.partition_size)
        self._shares = [
            flat.narrow(0, replicas.rank * size, size)
            for flat, size, replicas in zip(gradients.flat, sizes, self._replicas, strict=True)
        ]
        adamw, partitions = optimizer.optimizer, optimizer.parallel_partitioned_bit16_groups
        for shard, parts, replicas in zip(
            optimizer.single_partition_of_fp32_groups, partitions, self._replicas, strict=True
        ):
            adamw.copies[id(shard)] = parts[replicas.rank].data
        for hook in optimizer._grad_acc_hooks:
            hook.remove()  # they would hand gradients to DeepSpeed's buckets
        optimizer.reduce_gradients = self._reduce
        optimizer.step = self._step
        optimizer.zero_grad = lambda set_to_none=True: None  # `GradientBuffers.begin_step`

    def _reduce(self, pipeline_parallel: bool = False) -> None:
        """Every rank's share becomes the mean over all replicas, in the buffers' dtype.

        Tokens of all expert-parallel ranks have met at an expert: its gradient has their sum, and
        is summed over its replicas alone, but divided by the number of all replicas of the rest.
        """
        if self._grid.dp_cp_size == 1:
            return
        for flat, share, replicas in zip(
            self._gradients.flat, self._shares, self._replicas, strict=True
        ):
            flat.div_(self._grid.dp_cp_size)
            if replicas.size > 1:
                _reduce_scatter(share, flat, group=replicas.group)

    @torch.no_grad()
    def _step(self, closure: Any = None) -> None:
        """Clip, update this rank's shards, and gather the parameters from all ranks.

        The device decides by itself whether to update and how much to clip: the host sends the
        update behind the norm, learns of both while the device computes, and prepares the next
        step meanwhile.
        """
        zero = self._zero
        shards = zero.single_partition_of_fp32_groups
        for shard, share in zip(shards, self._shares, strict=True):
            shard.grad = share.to(shard.dtype)  # the share itself if it is float32
        gradients = {id(shard): shard.grad for shard in shards}
        pieces = [(f.parameter, f.of(gradients[id(f.tensor)])) for f in self.fragments]
        sum_replicated(pieces, self._grid)
        norm = global_norm(pieces, self._grid, over_dp_cp=True, measured=self._measured)
        self._guard.send(norm)
        self._update(norm)
        (zero._global_grad_norm,) = self._guard.receive()
        finite = math.isfinite(zero._global_grad_norm) and self._guard.loss_is_finite
        zero.overflow = not finite
        if zero.overflow:
            zero.optimizer.retract()
        for shard in shards:
            shard.grad = None

    def _update(self, norm: torch.Tensor) -> None:
        zero = self._zero
        limit, adamw = self._clip_grad, zero.optimizer
        norm = norm.double()
        adamw.clip = (limit / (norm + 1e-6)).clamp(max=1.0) if limit else torch.ones_like(norm)
        adamw.applies = self._guard.may_update(norm)
        adamw.step()
        if self._grid.dp_cp_size == 1:
            return
        for flat, parts, replicas in zip(
            zero.bit16_groups_flat,
            zero.parallel_partitioned_bit16_groups,
            self._replicas,
            strict=True,
        ):
            if replicas.size > 1:
                own = parts[replicas.rank].data
                dist.all_gather_into_tensor(flat.data, own, group=replicas.group)
