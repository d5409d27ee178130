"""This rank's tokens of a micro-batch: context parallel ranks read the same samples.

Each rank has its chunks of every sample (`chunks.py`), and the loss is a mean over the tokens of
all of them: `divisor` is what the sum over this rank's tokens is divided by, so that the mean over
data and context parallel ranks is that of whole micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import pad

from megasparse.megatron.context.attention import gather_sequence
from megasparse.megatron.context.chunks import own_chunks
from megasparse.megatron.grid import Grid

DIVISOR = "divisor"
# Names in a batch, and the dimension along which the tokens of a sample lie; masks `(B, 1, S, S)`
# keep all keys.
_TOKENS = {"tokens": 1, "labels": 1, "position_ids": 1, "loss_mask": 1, "attention_mask": 2}


def own_tokens(batch: dict[str, torch.Tensor], grid: Grid) -> dict[str, torch.Tensor]:
    """The batch that this rank computes; without context parallelism the batch as it is.

    Args:
        batch: of whole samples, maybe with `divisor` (conversations).

    Returns:
        The same names, with `divisor`: 0-d float32, that of the batch, or the tokens that count, at
        least 1 of them; over cp.
    """
    if grid.cp_size == 1:
        return batch
    own = {
        name: own_chunks(tensor, _TOKENS[name], grid.cp_rank, grid.cp_size)
        if name in _TOKENS
        else tensor
        for name, tensor in batch.items()
    }
    whole = batch.get(DIVISOR)
    own[DIVISOR] = (
        batch["loss_mask"].sum().clamp(min=1.0) if whole is None else whole
    ) / grid.cp_size
    return own


def whole_logits(
    compute: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    tokens: torch.Tensor,
    positions: torch.Tensor,
    grid: Grid,
) -> torch.Tensor:
    """`(B, S, V)` on every rank, of `(B, S)` int64 tokens that are the same on all.

    Args:
        compute: logits of this rank's tokens and positions. Tokens that fill the sequence up to a
            multiple come last, where no other sees them.
    """
    if grid.cp_size == 1:
        return compute(tokens, positions)
    length = tokens.shape[1]
    missing = -length % (2 * grid.cp_size * grid.tp_size)
    filled = (pad(t, (0, missing)) for t in (tokens, positions))
    own = (own_chunks(t, 1, grid.cp_rank, grid.cp_size) for t in filled)
    logits = compute(*own).transpose(0, 1)
    return gather_sequence(logits, grid.cp_group).transpose(0, 1)[:, :length].contiguous()
