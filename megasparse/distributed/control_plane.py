"""The control plane: small values in JSON between all ranks, over a gloo group of its own.

Where one rank checks something alone, its result or its error must reach all others, or they would
wait for ever in the next collective.

Values go up and down a binomial tree: a decision of N ranks takes 2 log N messages one after the
other and 2 (N - 1) in all, and a rank is connected to log N others at most. Ranks of a host have
neighbouring numbers, so most messages stay within a host.
"""

from __future__ import annotations

import datetime
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
Reduction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class ControlPlane:
    """Decisions that all ranks of a run make together; all methods are collective calls.

    Args:
        group: gloo, over all ranks (torch.distributed must be up); None for one rank alone.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self.rank = 0 if group is None else group.rank()
        self.world = 1 if group is None else group.size()
        self._parent, self._children = tree(self.rank, self.world)

    def max_over_ranks(self, values: list[int]) -> list[int]:
        """The largest of every value over all ranks."""
        return self._reduce(values, torch.maximum)

    def sum_over_ranks(self, values: list[int]) -> list[int]:
        """The sum of every value over all ranks."""
        return self._reduce(values, torch.add)

    def barrier(self) -> None:
        """Returns once all ranks have called it."""
        self.max_over_ranks([0])

    def collect(self, value: Any) -> list[Any] | None:
        """Every rank's JSON value, by rank, on rank 0; None on the others."""
        values = [value]
        for child in self._children:
            values += self._receive(child)
        if self._parent is None:
            return values
        self._send(values, self._parent)
        return None

    def broadcast(self, value: Any) -> Any:
        """Rank 0's JSON value on every rank."""
        if self._parent is not None:
            value = self._receive(self._parent)
        for child in reversed(self._children):
            self._send(value, child)
        return value

    def gather(self, value: Any) -> list[Any]:
        """Every rank's JSON value, by rank, on every rank: for little values, and seldom.

        What one rank can judge is collected on it.
        """
        values: list[Any] = self.broadcast(self.collect(value))
        return values

    def first(self, value: Any) -> Any:
        """The JSON value of the first rank that has one that is not None, on every rank."""
        for child in self._children:  # in order of the ranks
            other = self._receive(child)
            value = other if value is None else value
        if self._parent is not None:
            self._send(value, self._parent)
        return self.broadcast(value)

    def exchange(self, messages: dict[int, list[Any]]) -> list[Any]:
        """JSON values from any rank to any other, in log N rounds with log N neighbours.

        A round of 2^k passes on to the rank 2^k further what has that bit in the way left to it.

        Args:
            messages: by the rank that they are for.

        Returns:
            All that are for this rank, in any order.
        """
        held = [
            ((rank - self.rank) % self.world, value)
            for rank, values in messages.items()
            for value in values
        ]
        step = 1
        while step < self.world:
            going = [(way - step, value) for way, value in held if way & step]
            held = [(way, value) for way, value in held if not way & step]
            content = torch.frombuffer(bytearray(json.dumps(going).encode()), dtype=torch.uint8)
            source = (self.rank - step) % self.world
            target = (self.rank + step) % self.world
            size = torch.tensor([len(content)])
            size = self.swap({target: size}, {source: torch.empty_like(size)})[source]
            room = torch.empty(int(size), dtype=torch.uint8)
            come = self.swap({target: content}, {source: room})[source]
            held += json.loads(come.numpy().tobytes())
            step <<= 1
        return [value for _, value in held]

    def swap(
        self, outgoing: dict[int, torch.Tensor], rooms: dict[int, torch.Tensor]
    ) -> dict[int, torch.Tensor]:
        """Send tensors to some ranks and receive from some, each directly, all at once.

        Args:
            outgoing: by rank; on the CPU.
            rooms: what is received by rank, of the size and dtype that it sends.

        Returns:
            The rooms, filled.
        """
        work = [dist.irecv(room, rank, self._group) for rank, room in rooms.items()]
        work += [dist.isend(value, rank, self._group) for rank, value in outgoing.items()]
        for one in work:
            assert one is not None
            one.wait()
        return rooms

    def on_all_ranks(self, work: Callable[[], object]) -> None:
        """`work()` on every rank; an error anywhere is raised on all.

        Raises:
            MegasparseError: the first failing rank's, naming it.
        """
        failure, answer = self._try(work)
        self._raise(self.first(answer if "error" in answer else None), failure)

    def on_rank_zero(self, work: Callable[[], Any]) -> Any:
        """`work()` on rank 0 alone; its JSON value, or its error, on every rank."""
        failure, answer = self._try(work) if self.rank == 0 else (None, {})
        answer = self.broadcast(answer)
        self._raise(answer if "error" in answer else None, failure)
        return answer["value"]

    def _try(self, work: Callable[[], object]) -> tuple[Exception | None, dict[str, Any]]:
        try:
            return None, {"value": work()}
        except (MegasparseError, OSError) as error:
            kind = type(error).__name__ if isinstance(error, MegasparseError) else "StorageError"
            return error, {"error": kind, "message": one_line(error), "rank": self.rank}

    def _raise(self, told: dict[str, Any] | None, failure: Exception | None) -> None:
        if told is None:
            return
        where = f"rank {told['rank']}: " if self.world > 1 else ""
        kind = _ERRORS.get(told["error"], MegasparseError)
        raise kind(where + told["message"]) from failure

    def _reduce(self, values: list[int], reduction: Reduction) -> list[int]:
        mine = torch.tensor(values, dtype=torch.int64)
        other = torch.empty_like(mine)
        for child in self._children:
            dist.recv(other, child, self._group)
            mine = reduction(mine, other)
        if self._parent is not None:
            dist.send(mine, self._parent, self._group)
            dist.recv(mine, self._parent, self._group)
        for child in reversed(self._children):
            dist.send(mine, child, self._group)
        return mine.tolist()

    def _send(self, value: Any, rank: int) -> None:
        content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        dist.send(torch.tensor([len(content)]), rank, self._group)
        dist.send(content, rank, self._group)

    def _receive(self, rank: int) -> Any:
        size = torch.zeros(1, dtype=torch.int64)
        dist.recv(size, rank, self._group)
        content = torch.empty(int(size), dtype=torch.uint8)
        dist.recv(content, rank, self._group)
        return json.loads(content.numpy().tobytes())


def tree(rank: int, world: int) -> tuple[int | None, list[int]]:
    """A rank's place in the binomial tree over all ranks.

    Returns:
        The parent (None: rank 0), and the children, whose subtrees hold consecutive ranks that
        follow each other and this one.
    """
    children = []
    bit = 1
    while bit < world and not rank & bit:
        if rank | bit < world:
            children.append(rank | bit)
        bit <<= 1
    return (rank & ~bit if rank else None), children


def make_control_plane(timeout: datetime.timedelta | None = None) -> ControlPlane:
    """The control plane of all ranks of the process group; a collective call.

    Args:
        timeout: of one message; None: gloo's own, half an hour.
    """
    world = dist.get_world_size()
    return ControlPlane(dist.new_group(backend="gloo", timeout=timeout) if world > 1 else None)


def as_user_error(error: OSError) -> StorageError:
    """The one-line error of a file that the system refused."""
    return StorageError(one_line(error))
