"""A router's choice as a list: sorted by expert, and of each token where its parts are."""

from __future__ import annotations

from typing import NamedTuple

import torch

from megasparse.errors import KernelError
from megasparse.kernels import dispatch
from megasparse.kernels.expert_routes import reference, triton


class Routes(NamedTuple):
    """What `expert_routes` gives; n is tokens times the experts of each.

    Attributes:
        chosen: int64 (n,), `token x experts + expert` of each part, sorted by expert, then token.
        tokens: int64 (n,), the token of each.
        parts: int32 (T, k), of each token its places among them, by expert; -1: it has no more.
    """

    chosen: torch.Tensor
    tokens: torch.Tensor
    parts: torch.Tensor


@torch.no_grad()
def expert_routes(routing_map: torch.Tensor, each: int, *, backend: str | None = None) -> Routes:
    """The experts that a router chose. Nothing waits for the device.

    Args:
        routing_map: bool (T, E), `each` of every token true.
        each: experts of a token.
        backend: None, "reference" or "triton".

    Raises: KernelError for another map, or a backend that cannot run.
    """
    wrong = routing_map.dim() != 2 or routing_map.dtype != torch.bool
    if wrong or not 0 < each <= routing_map.shape[1]:
        raise KernelError(
            f"expert_routes: a map of {routing_map.dtype} {tuple(routing_map.shape)}, expected "
            f"bool, (tokens, {each} experts or more)"
        )
    run = dispatch.implementation(
        "expert_routes",
        routing_map,
        backend,
        reference=reference.expert_routes,
        triton=triton.expert_routes,
    )
    with torch.cuda.device_of(routing_map):  # Triton launches on the current device
        return Routes(*run(routing_map, each))
