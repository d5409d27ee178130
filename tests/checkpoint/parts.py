"""The parts of a stored model that tensor-parallel ranks read, against slices of the whole."""

from __future__ import annotations

from unittest import mock

import torch

from megasparse.checkpoint.model import StoredModel
from megasparse.config.shapes import parameters
from megasparse.convert.source import part_of_whole
from megasparse.sparsity.shard import WeightShard
from megasparse.tensor_files import TensorFile


def check_parts(stored: StoredModel, world: int, exact: bool = True) -> tuple[int, int]:
    """Compare all parameters, with a vocabulary padded further than in the checkpoint.

    Args:
        exact: bit for bit; else up to the rounding of S P.

    Returns:
        Bytes that the ranks have read of what is cut, and bytes of those tensors read whole.
    """
    rows = stored.model.vocab_size + 8 * world - stored.model.vocab_size % (8 * world)
    counts = [0, 0]
    fill = TensorFile._fill

    def counted(self: TensorFile, target: memoryview, position: int) -> None:
        counts[reading_whole] += len(target)
        fill(self, target, position)

    with mock.patch.object(TensorFile, "_fill", counted):
        for one in parameters(stored.model, rows):
            if one.shard_dim is None:
                continue
            reading_whole = True
            whole = part_of_whole(stored, one.name, WeightShard(one.shape))
            reading_whole = False
            for rank in range(world):
                shard = WeightShard(one.shape, one.shard_dim, rank, world, one.parts)
                part = stored.read_part(one.name, shard)
                expected = shard.slice_of(whole)
                assert part.dtype == expected.dtype and part.shape == expected.shape
                if exact:
                    assert torch.equal(part, expected), one.name
                else:
                    torch.testing.assert_close(part, expected)
    return counts[0], counts[1]
