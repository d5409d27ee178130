"""The sparsity state of weights in a checkpoint: where its tensors lie, and W~ by it."""

from __future__ import annotations

import dataclasses

import torch

from megasparse.checkpoint.pieces import Piece
from megasparse.checkpoint.reader import CheckpointReader
from megasparse.checkpoint.shared_reader import SharedReader
from megasparse.config.batches import DEFAULT_ITERS
from megasparse.convert.source import check_shape
from megasparse.errors import CheckpointError
from megasparse.sparsity import schedule
from megasparse.sparsity.recipe import SparsityRecipe
from megasparse.sparsity.shard import WeightShard
from megasparse.sparsity.state import SparseWeight

# In the names of stacked weights.
EXPERTS = ".mlp.experts."


def effective_weight(reader: CheckpointReader, name: str, recipe: SparsityRecipe) -> torch.Tensor:
    """W~ `(N, K)` of a stored sparse weight, whole, on the CPU, as of the checkpoint's step."""
    return _effective(reader, name, recipe, WeightShard(reader.shape(f"param/{name}")))


def effective_part(
    reader: CheckpointReader, name: str, recipe: SparsityRecipe, shard: WeightShard
) -> torch.Tensor:
    """A rank's part of W~: masks of a part are parts of the mask, for the shards of any layout.

    Raises:
        CheckpointError: the weight is of another shape.
    """
    check_shape(reader.shape(f"param/{name}"), shard, name, str(reader.folder))
    now = schedule.span_at(recipe, reader.meta["step"], run_length(reader)).recipe
    has_scale = now.s_ste_scale == "frozen" and f"sparsity/{name}/scale" in reader
    if now.projection == "soft_threshold" and not has_scale:
        return shard.slice_of(effective_weight(reader, name, recipe))
    return _effective(reader, name, recipe, shard)


def _effective(
    reader: CheckpointReader, name: str, recipe: SparsityRecipe, shard: WeightShard
) -> torch.Tensor:
    own = reader.read_part(Piece(f"param/{name}", shard)).view(shard.local_shape)
    experts = stacked_experts(reader, name)
    state = SparseWeight(
        name, recipe, shard, experts=None if experts is None else experts // shard.blocks
    )
    loaded = own_flips(sparsity_state(reader, state), state.shard)
    state.import_state(loaded, torch.device("cpu"))
    state.train_iters = run_length(reader)
    return state.effective_at(own, reader.meta["step"])


def stacked_experts(reader: CheckpointReader, name: str) -> int | None:
    """How many experts' weights a stored weight has stacked; None: it is no experts'."""
    number: int | None = reader.meta["config"]["model"].get("num_experts")
    return number if EXPERTS in name else None


def run_length(reader: CheckpointReader) -> int:
    """Steps of the run that a checkpoint is of; what was imported says nothing of them."""
    iterations: int | None = reader.meta["config"]["train"]["train_iters"]
    return iterations or DEFAULT_ITERS


def sparsity_state(
    reader: CheckpointReader | SharedReader, state: SparseWeight
) -> dict[str, torch.Tensor]:
    """What `SparseWeight.import_state` takes, for the state's shard, once `own_flips` was called.

    Returns:
        `counters`, and as the recipe has them: `mask` (pattern indices, uint8), `scale`, `flips`
        (of all tensor-parallel ranks), `input_square`, cut for the rank.

    Raises:
        CheckpointError: there is none.
    """
    prefix = f"sparsity/{state.name}/"
    counters = f"{prefix}counters"
    if counters not in reader:
        raise CheckpointError(f"{reader.folder}: holds no sparsity state of {state.name}")
    loaded = {}
    for key in reader.keys_beside(counters, prefix):
        kind = key.removeprefix(prefix)
        shard = WeightShard(reader.shape(key))
        if kind == "mask":
            shard = mask_shard(state, shard.global_shape[0] < state.shard.global_shape[0])
        elif kind == "scale" and state.experts is not None:
            shard = scale_shard(state)
        elif kind == "input_square" and state.shard.dim == 1:
            shard = input_shard(state)
        loaded[kind] = reader.read_part(Piece(key, shard)).view(shard.local_shape)
    return loaded


def own_flips(loaded: dict[str, torch.Tensor], shard: WeightShard) -> dict[str, torch.Tensor]:
    """A state with the flips of this rank alone.

    Counts of other ranks cannot be told apart in another layout: the first takes them all.
    """
    flips = loaded.get("flips")
    if flips is None:
        return loaded
    here = flips_shard(shard)
    if len(flips) == here.world:
        own = flips[here.rank]
    else:
        own = flips.sum() if here.rank == 0 else flips.new_zeros(())
    return {**loaded, "flips": own.clone()}


def mask_shard(state: SparseWeight, transposable: bool) -> WeightShard:
    """Where the local pattern indices lie: the weight's shard in units of blocks or groups."""
    rows, columns = state.shard.global_shape
    height = 4 if transposable else 1
    shard = state.shard
    return dataclasses.replace(shard, global_shape=(rows // height, columns // 4))


def flips_shard(shard: WeightShard) -> WeightShard:
    """Where a rank's flips of a weight lie among those of all ranks that have a part of it."""
    world = shard.world * shard.blocks
    return WeightShard((world,), 0, shard.block * shard.world + shard.rank, world)


def scale_shard(state: SparseWeight) -> WeightShard:
    """Where the scales of this rank's experts lie among all."""
    assert state.experts is not None
    shard = state.shard
    return WeightShard((state.experts * shard.blocks,), block=shard.block, blocks=shard.blocks)


def input_shard(state: SparseWeight) -> WeightShard:
    """Where the local input channels of a row-parallel layer lie in the whole."""
    shard = state.shard
    return WeightShard((shard.global_shape[1],), 0, shard.rank, shard.world, shard.parts)
