"""What DeepSpeed has to know of experts that are divided over data-parallel ranks.

Its engine sums the gradients of such parameters (`allreduce` is False) over the ranks that hold the
same ones, and its ZeRO divides their state over those. It learns of experts by a module of its own
class, and of the groups by a table of names.
"""

from __future__ import annotations

from typing import Any

import torch

from megasparse.megatron.grid import Grid, is_divided_expert
from megasparse.optim.adamw import EXPERT_GROUPS
from megasparse.train.engine.deepspeed import MoE, deepspeed_groups


class HasExperts(MoE):
    """Tells DeepSpeed's engine that there are experts; it computes nothing.

    Args:
        num_experts: of a layer.
    """

    def __init__(self, num_experts: int) -> None:
        torch.nn.Module.__init__(self)  # DeepSpeed's own would build a layer
        self.num_experts = num_experts

    def set_deepspeed_parallelism(self, *_: Any, **__: Any) -> None:
        """The groups are there: `tell_of_experts`."""


def tell_of_experts(module: torch.nn.Module, grid: Grid) -> None:
    """Before DeepSpeed's engine is made around `module`; of one without divided experts nothing."""
    if not any(is_divided_expert(parameter) for parameter in module.parameters()):
        return
    for name in EXPERT_GROUPS:
        deepspeed_groups._EXPERT_PARALLEL_GROUP[name] = grid.ep_group
        deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP[name] = grid.expert_replicas.group
    module.add_module("has_experts", HasExperts(1))
