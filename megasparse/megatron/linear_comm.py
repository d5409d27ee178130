"""What a column-parallel linear communicates: its input, and the gradient of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist


class SumOverTensorParallel:
    """Column-parallel without sp: every rank has the whole input; its gradients are summed."""

    gathers = False

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    def gather(self, x_local: torch.Tensor) -> tuple[torch.Tensor, Callable[[], object]]:
        return x_local, lambda: None

    def reduce(self, dx: torch.Tensor) -> tuple[torch.Tensor, Callable[[], object]]:
        dx = dx.contiguous()
        work = dist.all_reduce(dx, group=self._group, async_op=True)
        assert work is not None
        return dx, work.wait


class GatherOverSequence:
    """Column-parallel with sp: inputs are gathered, their gradients summed and scattered."""

    gathers = True

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    def gather(self, x_local: torch.Tensor) -> tuple[torch.Tensor, Callable[[], object]]:
        shape = (x_local.shape[0] * self._group.size(), *x_local.shape[1:])
        whole = torch.empty(shape, dtype=x_local.dtype, device=x_local.device)
        work = dist.all_gather_into_tensor(
            whole, x_local.contiguous(), group=self._group, async_op=True
        )
        assert work is not None
        return whole, work.wait

    def reduce(self, dx: torch.Tensor) -> tuple[torch.Tensor, Callable[[], object]]:
        shape = (dx.shape[0] // self._group.size(), *dx.shape[1:])
        part = torch.empty(shape, dtype=dx.dtype, device=dx.device)
        work = dist.reduce_scatter_tensor(part, dx.contiguous(), group=self._group, async_op=True)
        assert work is not None
        return part, work.wait
