"""Attention of this rank's queries to all keys and values, gathered over context parallel ranks.

    forward    k, v = gather(k_local, v_local)          z = attend(q_local, k, v)
    backward   dk_local, dv_local = sum over ranks, scattered, of dk, dv

It needs no more than all-gather and reduce-scatter, so it runs on gloo too, and with masks, which
Transformer Engine's attention does not take. Keys and values travel in one exchange.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megasparse.megatron.context.chunks import by_rank, in_order, own_places


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        whole = local.new_empty((local.shape[0] * group.size(), *local.shape[1:]))
        dist.all_gather_into_tensor(whole, local.contiguous(), group=group)
        return in_order(whole, group.size())

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        size = ctx.group.size()
        whole = by_rank(grads[0], size)
        local = whole.new_empty((whole.shape[0] // size, *whole.shape[1:]))
        dist.reduce_scatter_tensor(local, whole, group=ctx.group)
        return local, None


def gather_sequence(local: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """`(S, ...)` in order of the places, of every rank's `(S / cp, ...)`; with gradients."""
    return _GatherSequence.apply(local, group)


def gather_keys_and_values(
    key: torch.Tensor, value: torch.Tensor, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """Those of the whole sequence, `(S, B, groups, D)`, of this rank's `(S / cp, ...)`."""
    both = gather_sequence(torch.stack([key, value], 1), group)
    whole_key, whole_value = both.unbind(1)
    return whole_key, whole_value


def own_causal_mask(length: int, group: dist.ProcessGroup, device: torch.device) -> torch.Tensor:
    """`(S / cp, S)` bool: which keys of the whole sequence this rank's queries may attend to.

    Args:
        length: S.
    """
    queries = query_places(length, group.rank(), group.size(), device)
    return torch.arange(length, device=device) <= queries[:, None]


def query_places(length: int, rank: int, size: int, device: torch.device) -> torch.Tensor:
    """`(S / cp,)` int64: the places of this rank's tokens in a sequence of `length`."""
    places = own_places(length, rank, size)
    return torch.cat([torch.arange(p.start, p.stop, device=device) for p in places])
