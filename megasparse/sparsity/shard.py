"""Where a rank's piece of a weight lies in the whole.

The weights of a layer's experts are stacked along dimension 0, and expert-parallel ranks have equal
blocks of it. A tensor-parallel shard is then one of a block.

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
class TokenShare:
    """Which tokens of a micro-batch a context parallel rank has (`megatron/context/chunks.py`).

    Attributes:
        rank, size: of context parallelism; without it a rank has all.
    """

    rank: int = 0
    size: int = 1

    def places(self, tokens: int) -> tuple[tuple[int, int], ...]:
        """Runs of consecutive tokens of this rank's `tokens`: (first one here, its place in the
        micro-batch). Sequences lie side by side, so a chunk of them is one run.
        """
        if self.size == 1:
            return ((0, 0),)
        half = tokens // 2
        return ((0, self.rank * half), (half, (2 * self.size - 1 - self.rank) * half))


ALL_TOKENS = TokenShare()


@dataclass(frozen=True)
class WeightShard:
    """A rank's part of a 1-D or 2-D parameter.

    Attributes:
        global_shape: shape of the whole parameter.
        dim: sharded dimension, or None for a replicated parameter.
        rank, world: position in the tensor-parallel group.
        parts: number of fused logical matrices along `dim` (2 for gate/up); of the block.
        block, blocks: which of how many equal parts of dimension 0, one after the other; dim, rank,
            world and parts are of that block.
    """

    global_shape: tuple[int, ...]
    dim: int | None = None
    rank: int = 0
    world: int = 1
    parts: int = 1
    block: int = 0
    blocks: int = 1

    def __post_init__(self) -> None:
        if self.blocks > 1 and self.global_shape[0] % self.blocks:
            raise ConfigError(
                f"dimension 0 of a weight {self.global_shape} is not divisible by {self.blocks} "
                "blocks of experts"
            )
        if self.dim is not None and self.block_shape[self.dim] % (self.world * self.parts):
            raise ConfigError(
                f"dimension {self.dim} of a weight {self.block_shape} is not divisible by "
                f"{self.parts} fused parts x {self.world} ranks"
            )

    @property
    def block_shape(self) -> tuple[int, ...]:
        """Shape of the block that the shard is of; the whole, if there is one block."""
        if self.blocks == 1:
            return self.global_shape
        return (self.global_shape[0] // self.blocks, *self.global_shape[1:])

    @property
    def block_start(self) -> int:
        """Where the block begins along dimension 0."""
        return 0 if self.blocks == 1 else self.block * self.block_shape[0]

    @property
    def is_whole(self) -> bool:
        """Whether it is all of the parameter."""
        return self.dim is None and self.blocks == 1

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of the rank's part."""
        if self.dim is None:
            return self.block_shape
        shape = list(self.block_shape)
        shape[self.dim] //= self.world
        return tuple(shape)

    def slices(self, dim: int) -> tuple[ShardSlice, ...]:
        """How the local entries along `dim` map to the whole."""
        first = self.block_start if dim == 0 else 0
        if dim != self.dim:
            return (ShardSlice(0, first, self.block_shape[dim]),)
        part = self.block_shape[dim] // self.parts
        length = part // self.world
        return tuple(
            ShardSlice(i * length, first + i * part + self.rank * length, length)
            for i in range(self.parts)
        )

    def _block_of(self, whole: torch.Tensor) -> torch.Tensor:
        return whole if self.blocks == 1 else whole.narrow(0, self.block_start, self.block_shape[0])

    def _slices_of_block(self) -> list[tuple[ShardSlice, int]]:
        """The slices along `dim`, and where each begins in the block."""
        assert self.dim is not None
        first = self.block_start if self.dim == 0 else 0
        return [(one, one.global_start - first) for one in self.slices(self.dim)]

    def slice_of(self, whole: torch.Tensor) -> torch.Tensor:
        """The rank's part of a whole tensor of shape `global_shape`."""
        block = self._block_of(whole)
        if self.dim is None:
            return block
        pieces = [block.narrow(self.dim, at, s.length) for s, at in self._slices_of_block()]
        return torch.cat(pieces, self.dim)

    def write_into(self, whole: torch.Tensor, part: torch.Tensor) -> None:
        """Write the rank's part into a whole tensor (the adjoint of `slice_of`)."""
        block = self._block_of(whole)
        if self.dim is None:
            block.copy_(part)
            return
        for s, at in self._slices_of_block():
            block.narrow(self.dim, at, s.length).copy_(
                part.narrow(self.dim, s.local_start, s.length)
            )
