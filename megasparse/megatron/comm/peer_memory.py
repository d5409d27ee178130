"""Gathers and sums over the GPUs of a tensor-parallel group, through memory that each has opened.

NCCL takes longer for the few megabytes of a layer's activations than NVLink needs. Here a rank
puts what others want where they can read it (torch's symmetric memory), meets them at a barrier of
the device, and reads theirs: a gather is copies, and a sum is one kernel that reads all parts.
Everything runs on one stream beside the computation, and can be captured in a CUDA graph.

What a rank has opened may be written again once its readers are through: a rank comes to a barrier
after all that it has read before, so that is so behind the next barrier of any other exchange.
Exchanges of different names use different memory; where one name follows itself there is a second
barrier.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import _symmetric_memory

from megasparse.distributed.hosts import host_identity
from megasparse.errors import KernelError
from megasparse.kernels import copy_bytes_, sum_parts
from megasparse.kernels.sum_parts import MOST_PARTS
from megasparse.log import log_once

Pending = tuple[torch.Tensor, Callable[[], object]]


class PeerMemory:
    """The exchanges of one group; all ranks call them in the same order, with the same shapes.

    Args:
        group: of GPUs of one host.
        device: this rank's GPU.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self._group, self._device = group, device
        self._rank, self._size = group.rank(), group.size()
        self._stream = torch.cuda.Stream(device)
        self._opened: dict[str, tuple[int, Any]] = {}
        self._outgrown: list[Any] = []  # captured exchanges still refer to them
        self._last = ""

    def open(self, name: str, size: int) -> Any:
        """The handle of an exchange's memory of at least `size` bytes; collective where it grows.

        Raises:
            KernelError: it would have to grow while a graph is captured.
            RuntimeError: the GPUs cannot read each other's memory.
        """
        known, handle = self._opened.get(name, (0, None))
        if known >= size:
            return handle
        if torch.cuda.is_current_stream_capturing():
            raise KernelError(f"{name} needs {size} bytes of peer memory in a capture, had {known}")
        if handle is not None:
            self._outgrown.append(handle)
        memory = _symmetric_memory.empty(size, dtype=torch.uint8, device=self._device)
        handle = _symmetric_memory.rendezvous(memory, self._group)
        self._opened[name] = size, handle
        return handle

    def gather(self, name: str, x_local: torch.Tensor) -> Pending:
        """Start to gather `(S/p, ...)` of every rank to `(S, ...)`; valid after calling `wait`."""
        x_local = x_local.contiguous()
        whole = x_local.new_empty((x_local.shape[0] * self._size, *x_local.shape[1:]))
        handle = self.open(name, x_local.nbytes)
        shape, parts = x_local.shape, whole.chunk(self._size)

        def run() -> None:
            views = [handle.get_buffer(r, shape, x_local.dtype) for r in range(self._size)]
            copy_bytes_(views[self._rank], x_local)
            copy_bytes_(parts[self._rank], x_local)
            handle.barrier(channel=0)
            for rank in self._others():
                copy_bytes_(parts[rank], views[rank])

        return whole, self._beside(name, handle, run, (x_local,))

    def reduce(self, name: str, z: torch.Tensor) -> Pending:
        """Start to sum `(S, ...)` over ranks, to this rank's `(S/p, ...)` of it."""
        z = z.contiguous()
        handle = self.open(name, z.nbytes)
        mine = z.chunk(self._size)
        part = torch.empty_like(mine[self._rank])

        def run() -> None:
            own = handle.get_buffer(self._rank, z.shape, z.dtype).chunk(self._size)
            for rank in self._others():
                copy_bytes_(own[rank], mine[rank])
            handle.barrier(channel=0)
            theirs = [
                mine[rank]
                if rank == self._rank
                else handle.get_buffer(rank, z.shape, z.dtype).chunk(self._size)[self._rank]
                for rank in range(self._size)
            ]
            sum_parts(theirs, out=part)

        return part, self._beside(name, handle, run, (z,))

    def _others(self) -> Sequence[int]:
        """The other ranks, each rank's next one first, so that all read from different ones."""
        return [(self._rank + step) % self._size for step in range(1, self._size)]

    def _beside(
        self, name: str, handle: Any, run: Callable[[], None], inputs: tuple[torch.Tensor, ...]
    ) -> Callable[[], object]:
        """Run on the stream of exchanges; what lets the current stream wait for it."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            if name == self._last:
                handle.barrier(channel=1)
            self._last = name
            run()
            done = self._stream.record_event()

        def wait(_: Any = inputs) -> None:  # their memory is not given away before
            torch.cuda.current_stream().wait_event(done)

        return wait


def peer_memory(group: dist.ProcessGroup, device: torch.device) -> PeerMemory | None:
    """The exchanges of a group whose GPUs can read each other's memory, else None; collective."""
    if device.type != "cuda" or not 1 < group.size() <= MOST_PARTS:
        return None
    hosts: list[Any] = [None] * group.size()
    dist.all_gather_object(hosts, host_identity(), group=group)
    failure = None if len(set(hosts)) == 1 else "they are on several hosts"
    found = PeerMemory(group, device)
    if failure is None:
        try:
            found.open("trial", 1024)
        except RuntimeError as error:
            failure = str(error).partition("\n")[0]
    failed = torch.tensor(float(failure is not None), device=device)
    dist.all_reduce(failed, op=dist.ReduceOp.MAX, group=group)
    if bool(failed):
        log_once(
            "tensor parallelism goes through NCCL: GPUs do not open their memory to each other: %s",
            failure or "another rank could not",
        )
        return None
    return found
