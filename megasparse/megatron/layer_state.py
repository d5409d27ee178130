"""What a parallel linear keeps beside its parameters, in Megatron's own checkpoints.

Both `state_dict` and `sharded_state_dict` have it, under names that begin with `sparsity_`:

    sparsity_mask       uint8 (N, K/4), four entries a byte; sharded as the weight is
    sparsity_numbers    int64 (5,): step of the last refresh, refreshes, whether there is a mask,
                        whether there is a scale, step of the run
    sparsity_scale      float32 (1,): S-STE's beta
    sparsity_fp8_...    delayed scales and their histories

All are there from the first step on, so that what is loaded has the names of what was saved.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
)

from megasparse.kernels.patterns import encode_patterns, pack_fours, unpack_fours
from megasparse.sparsity.state import SparseWeight

PREFIX = "sparsity_"
MASK = PREFIX + "mask"
# Parameters and states that are split as the weight is, beside it.
SPLIT = ("weight", MASK, "slorb_adapter")


class Linear(Protocol):
    """A parallel linear, as far as its checkpoints ask."""

    weight: torch.nn.Parameter
    bias: torch.nn.Parameter | None
    shard: Any
    state: SparseWeight | None
    dense: Any
    tp_group: Any

    @property
    def controller(self) -> Any:
        """Knows the step."""
        ...

    def state_dict(self, *, prefix: str, keep_vars: bool) -> dict[str, torch.Tensor]:
        """Of torch's modules."""
        ...


def export(linear: Linear) -> dict[str, torch.Tensor]:
    """The states of a layer; none of one that is dense in its own precision."""
    state, device = linear.state, linear.weight.device
    quantizers = None
    found: dict[str, torch.Tensor] = {}
    if state is not None:
        quantizers = state.quantizers
        mask, scale = state.mask, state.scale
        rows, columns = linear.weight.shape
        empty = torch.zeros((rows, columns // 4), dtype=torch.uint8, device=device)
        found[MASK] = empty if mask is None else pack_fours(mask)
        numbers = [
            state.last_refresh,
            state.refreshes,
            int(mask is not None),
            int(scale is not None),
            linear.controller.steps_done,
        ]
        found[PREFIX + "numbers"] = torch.tensor(numbers, dtype=torch.int64)
        none = torch.zeros((), device=device)
        found[PREFIX + "scale"] = (none if scale is None else scale).detach().clone().view(1)
    elif linear.dense is not None:
        quantizers = linear.dense.quantizers
    if quantizers is not None:
        found |= {PREFIX + name: value for name, value in quantizers.export_state().items()}
    return found


def taken_from(state_dict: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Take a layer's states out of what is loaded into a model.

    Args:
        prefix: of the layer's names.
    """
    names = [name for name in state_dict if name.startswith(prefix + PREFIX)]
    return {name[len(prefix + PREFIX) :]: state_dict.pop(name) for name in names}


def import_(linear: Linear, kept: dict[str, torch.Tensor]) -> None:
    """Take over what `export` gave; without it (a dense checkpoint) the state stays as it is."""
    state = linear.state
    if state is None and linear.dense is not None and kept:
        linear.dense.import_state(kept)
    if state is None:
        return
    state.invalidate()
    if "numbers" not in kept:
        return
    last_refresh, refreshes, has_mask, has_scale, step = kept["numbers"].tolist()
    known = {"counters": torch.tensor([last_refresh, refreshes], dtype=torch.int64)}
    if has_mask:
        mask = unpack_fours(kept["mask"].contiguous())
        # Which kind it is is not stored: one that fits both is the same mask by either.
        rows, columns = mask.shape
        both = not rows % 4 and bool((mask.view(-1, 4, columns).sum(1) == 2).all())
        known["mask"] = encode_patterns(mask, transposable=both)
    if has_scale:
        known["scale"] = kept["scale"].detach().clone().view(())
    known |= {name: value for name, value in kept.items() if name.startswith("fp8_")}
    state.import_state(known, linear.weight.device)
    linear.controller.set_steps_done(step)


def sharded(
    linear: Linear,
    prefix: str,
    sharded_offsets: tuple[tuple[int, int, int], ...] = (),
    metadata: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Parameters and states as megatron-core's sharded tensors.

    Args:
        prefix: of the layer's names.
        sharded_offsets: of layers that are stacked.
        metadata: of the checkpoint, or None.
    """
    tensors, shard = linear.state_dict(prefix="", keep_vars=True), linear.shard
    axes = dict.fromkeys(SPLIT, shard.dim)
    if shard.dim == 0:
        axes["bias"] = 0
    else:
        axes["slorb_projection"] = 1
    made = make_sharded_tensors_for_checkpoint(
        tensors,
        prefix,
        {name: axis for name, axis in axes.items() if name in tensors},
        sharded_offsets,
        tp_group=linear.tp_group,
        dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
    )
    if shard.parts == 2:  # gate and up; of weight and bias megatron-core's MLP sees to it
        singleton = (metadata or {}).get("singleton_local_shards", False)
        for name in (prefix + MASK, prefix + "slorb_adapter"):
            if name in made:
                made[name] = apply_swiglu_sharded_factory(made[name], sharded_offsets, singleton)
    return made
