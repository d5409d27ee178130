"""The definition of `expert_routes`, in plain torch."""

from __future__ import annotations

import torch


def expert_routes(
    routing_map: torch.Tensor, each: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Chosen, tokens and parts; see `megasparse.kernels.expert_routes`."""
    count, experts = routing_map.shape
    by_expert = routing_map.t()
    expert, token = torch.nonzero(by_expert).unbind(1)
    place = (by_expert.reshape(-1).cumsum(0) - 1).view(experts, count).t()
    return token * experts + expert, token, place[routing_map].view(count, each).int()
