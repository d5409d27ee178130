"""Where DeepSpeed's ZeRO keeps the float32 pieces of the model's parameters."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from megasparse.optim.fragments import Fragment


def fragments(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]], optimizer: torch.optim.Optimizer
) -> list[Fragment]:
    """The pieces of the parameters that this rank's optimizer holds.

    Args:
        named_parameters: of the model.
        optimizer: the base optimizer. Without ZeRO its tensors are the parameters; ZeRO 1 and 2
            give it one flat float32 shard a group, and note on each parameter (`_hp_mapping`)
            which part of the parameter lies where in it.
    """
    tensors = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    own = {id(tensor): tensor for tensor in tensors}
    by_storage = {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors}
    found = []
    for name, parameter in named_parameters:
        if id(parameter) in own:
            found.append(Fragment(name, parameter, parameter, 0, 0, parameter.numel()))
            continue
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is None:
            continue  # another data-parallel rank's
        piece = mapping.get_hp_fragment()
        flat = by_storage[piece.untyped_storage().data_ptr()]
        address = mapping.lp_fragment_address
        found.append(
            Fragment(
                name,
                parameter,
                flat,
                piece.storage_offset() - flat.storage_offset(),
                address.start,
                address.numel,
            )
        )
    return found
