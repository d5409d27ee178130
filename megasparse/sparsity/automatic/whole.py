"""Weights that FSDP2 has sharded: the whole of one, and what lies on this rank.

The rule: masks, scales and operands are of the whole weight, on every rank, from what FSDP2 gathers
for the forward pass; so they are what one rank would have. Optimizers and the masked decay see this
rank's rows alone.
"""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from megasparse.errors import ConfigError


def whole_of(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor; a collective call where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor: a view."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def part_of(whole: torch.Tensor, like: torch.Tensor, name: str) -> torch.Tensor:
    """The part of a whole tensor that `like`, a weight, has on this rank: a view.

    Args:
        name: of the layer, for the error.

    Raises:
        ConfigError: the weight is neither whole nor a DTensor (FSDP1, ZeRO 3).
    """
    if tuple(like.shape) != tuple(whole.shape):
        raise ConfigError(
            f"{name}: the optimizer's weight has shape {tuple(like.shape)}, expected "
            f"{tuple(whole.shape)}; of sharded weights FSDP2's (fully_shard) are supported"
        )
    if not isinstance(like, DTensor):
        return whole
    shape, offset = compute_local_shape_and_global_offset(
        like.shape, like.device_mesh, like.placements
    )
    for dim, (length, start) in enumerate(zip(shape, offset)):
        whole = whole.narrow(dim, min(start, whole.shape[dim]), length)
    return whole
