"""What parallel linears communicate: their inputs or outputs, and the gradients of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megasparse.megatron.comm.peer_memory import PeerMemory

# Of fewer a GEMM fills the GPU too badly to be cut in two; chosen, not measured.
LEAST_OWN_TOKENS = 1024


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

    def own_part(self, tokens: int) -> int | None:
        return None


class GatherOverSequence:
    """With sp, one side of a linear is split over the sequence: gathered one way, summed and
    scattered the other.

    Column-parallel linears gather their inputs and reduce the gradients of these; row-parallel ones
    reduce their outputs, and gather the gradients (`sum_over_sequence`).

    Args:
        group: of tensor parallelism.
        side: "input" or "output".

    Attributes:
        peers: through which the group exchanges; None: through NCCL or gloo.
    """

    gathers = True

    def __init__(self, group: dist.ProcessGroup, side: str) -> None:
        self._group, self._side = group, side
        self.peers: PeerMemory | None = None

    def gather(self, x_local: torch.Tensor) -> tuple[torch.Tensor, Callable[[], object]]:
        if self.peers is not None:
            return self.peers.gather(f"gather of the {self._side}", x_local)
        shape = (x_local.shape[0] * self._group.size(), *x_local.shape[1:])
        whole = torch.empty(shape, dtype=x_local.dtype, device=x_local.device)
        work = dist.all_gather_into_tensor(
            whole, x_local.contiguous(), group=self._group, async_op=True
        )
        assert work is not None
        return whole, work.wait

    def reduce(self, dx: torch.Tensor) -> tuple[torch.Tensor, Callable[[], object]]:
        if self.peers is not None:
            return self.peers.reduce(f"sum of the {self._side}", dx)
        shape = (dx.shape[0] // self._group.size(), *dx.shape[1:])
        part = torch.empty(shape, dtype=dx.dtype, device=dx.device)
        work = dist.reduce_scatter_tensor(part, dx.contiguous(), group=self._group, async_op=True)
        assert work is not None
        return part, work.wait

    def own_part(self, tokens: int) -> int | None:
        pays = self.peers is not None and tokens >= LEAST_OWN_TOKENS
        return self._group.rank() * tokens if pays else None


class _SumOverSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: torch.Tensor, comm: GatherOverSequence) -> torch.Tensor:
        ctx.comm = comm
        part, wait = comm.reduce(z)
        wait()
        return part

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        whole, arrived = ctx.comm.gather(grads[0])
        arrived()
        return whole, None


def sum_over_sequence(z: torch.Tensor, comm: GatherOverSequence) -> torch.Tensor:
    """`(S, ...)`, this rank's part of a sum, to this rank's `(S/p, ...)` of the sum; with
    gradients."""
    return _SumOverSequence.apply(z, comm)


def exchange_through(model: torch.nn.Module, peers: PeerMemory | None) -> None:
    """Let all linears of a model exchange through the memory of their GPUs; None: through NCCL."""
    for module in model.modules():
        comm = getattr(module, "comm", None)
        if isinstance(comm, GatherOverSequence):
            comm.peers = peers
