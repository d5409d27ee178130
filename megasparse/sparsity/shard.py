"""Where a rank's piece of a weight lies in the whole.

A tensor-parallel shard is a slice of the whole along one dimension, except where several logical
matrices are fused (gate and up of a gated FFN): there each rank holds a slice of each of them. So a
shard is a list of slices, each contiguous in the shard and in the whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megasparse.errors import ConfigError


@dataclass(frozen=True)
class ShardSlice:
    """`length` entries along the sharded dimension: local position and place in the whole."""

    local_start: int
    global_start: int
    length: int


@dataclass(frozen=True)
class WeightShard:
    """A rank's part of a 1-D or 2-D parameter.

    Attributes:
        global_shape: shape of the whole parameter.
        dim: sharded dimension, or None for a replicated parameter.
        rank, world: position in the tensor-parallel group.
        parts: number of fused logical matrices along `dim` (2 for gate/up).
    """

    global_shape: tuple[int, ...]
    dim: int | None = None
    rank: int = 0
    world: int = 1
    parts: int = 1

    def __post_init__(self) -> None:
        if self.dim is not None and self.global_shape[self.dim] % (self.world * self.parts):
            raise ConfigError(
                f"dimension {self.dim} of a weight {self.global_shape} is not divisible by "
                f"{self.parts} fused parts x {self.world} ranks"
            )

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of the rank's part."""
        if self.dim is None:
            return self.global_shape
        shape = list(self.global_shape)
        shape[self.dim] //= self.world
        return tuple(shape)

    def slices(self, dim: int) -> tuple[ShardSlice, ...]:
        """How the local entries along `dim` map to the whole."""
        if dim != self.dim:
            return (ShardSlice(0, 0, self.global_shape[dim]),)
        part = self.global_shape[dim] // self.parts
        length = part // self.world
        return tuple(
            ShardSlice(i * length, i * part + self.rank * length, length) for i in range(self.parts)
        )

    def slice_of(self, whole: torch.Tensor) -> torch.Tensor:
        """The rank's part of a whole tensor of shape `global_shape`."""
        if self.dim is None:
            return whole
        pieces = [whole.narrow(self.dim, s.global_start, s.length) for s in self.slices(self.dim)]
        return torch.cat(pieces, self.dim)

    def write_into(self, whole: torch.Tensor, part: torch.Tensor) -> None:
        """Write the rank's part into a whole tensor (the adjoint of `slice_of`)."""
        if self.dim is None:
            whole.copy_(part)
            return
        for s in self.slices(self.dim):
            whole.narrow(self.dim, s.global_start, s.length).copy_(
                part.narrow(self.dim, s.local_start, s.length)
            )
