"""The control plane: small values in JSON between all ranks, over a gloo group of its own.

Where one rank checks something alone, its result or its error must reach all others, or they would
wait for ever in the next collective.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megasparse import errors
from megasparse.errors import MegasparseError, StorageError, one_line

_ERRORS = {
    name: kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, MegasparseError)
}


class ControlPlane:
    """Decisions that all ranks of a run make together; all methods are collective calls.

    Args:
        group: gloo, over all ranks (torch.distributed must be up); None for one rank alone.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self.rank = 0 if group is None else group.rank()
        self.world = 1 if group is None else group.size()

    def max_over_ranks(self, values: list[int]) -> list[int]:
        """The largest of every value over all ranks."""
        if self._group is None:
            return values
        tensor = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self._group)
        return tensor.tolist()

    def barrier(self) -> None:
        """Returns once all ranks have called it."""
        self.max_over_ranks([0])

    def gather(self, value: Any) -> list[Any]:
        """Every rank's JSON value, by rank, on every rank."""
        if self._group is None:
            return [value]
        content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        size = torch.tensor([len(content)])
        sizes = [torch.zeros_like(size) for _ in range(self.world)]
        dist.all_gather(sizes, size, group=self._group)
        padded = torch.zeros(int(max(sizes)), dtype=torch.uint8)
        padded[: len(content)] = content
        parts = [torch.zeros_like(padded) for _ in range(self.world)]
        dist.all_gather(parts, padded, group=self._group)
        return [
            json.loads(bytes(part[: int(n)].numpy())) for part, n in zip(parts, sizes, strict=True)
        ]

    def on_all_ranks(self, work: Callable[[], Any]) -> list[Any]:
        """`work()` on every rank and its JSON values by rank; an error anywhere is raised on all.

        Raises:
            MegasparseError: the first failing rank's, naming it.
        """
        failure: Exception | None = None
        try:
            answer = {"value": work()}
        except (MegasparseError, OSError) as error:
            failure = error
            kind = type(error).__name__ if isinstance(error, MegasparseError) else "StorageError"
            answer = {"error": kind, "message": one_line(error)}
        answers = self.gather(answer)
        for rank, other in enumerate(answers):
            if "error" in other:
                where = f"rank {rank}: " if self.world > 1 else ""
                raise _ERRORS.get(other["error"], MegasparseError)(
                    where + other["message"]
                ) from failure
        return [other["value"] for other in answers]

    def on_rank_zero(self, work: Callable[[], Any]) -> Any:
        """`work()` on rank 0 alone; its JSON value, or its error, on every rank."""
        return self.on_all_ranks(lambda: work() if self.rank == 0 else None)[0]


def make_control_plane() -> ControlPlane:
    """The control plane of all ranks of the process group; a collective call."""
    world = dist.get_world_size()
    return ControlPlane(dist.new_group(backend="gloo") if world > 1 else None)


def as_user_error(error: OSError) -> StorageError:
    """The one-line error of a file that the system refused."""
    return StorageError(one_line(error))
