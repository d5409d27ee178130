"""The mask that prunes a stored weight, as its GEMMs use it at the checkpoint's step."""

from __future__ import annotations

import torch

from megasparse.checkpoint.pieces import Piece
from megasparse.checkpoint.reader import CheckpointReader
from megasparse.checkpoint.sparsity_state import own_flips, run_length, sparsity_state
from megasparse.sparsity.recipe import SparsityRecipe
from megasparse.sparsity.shard import WeightShard
from megasparse.sparsity.state import SparseWeight


def mask_part(
    reader: CheckpointReader, name: str, recipe: SparsityRecipe, shard: WeightShard
) -> torch.Tensor | None:
    """A rank's part of the mask, bool; one that is due is refreshed before.

    Args:
        recipe: of the stored run.

    Returns:
        None: the run had none.
    """
    if f"sparsity/{name}/mask" not in reader or not recipe.has_mask:
        return None
    own = reader.read_part(Piece(f"param/{name}", shard)).view(shard.local_shape)
    state = SparseWeight(name, recipe, shard)
    state.import_state(own_flips(sparsity_state(reader, state), shard), torch.device("cpu"))
    state.train_iters = run_length(reader)
    state.effective_at(own, reader.meta["step"])
    return state.mask
