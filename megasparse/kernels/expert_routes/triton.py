"""Triton kernels of `expert_routes`: blocks of tokens count their experts, then write where to."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megasparse.kernels.dispatch import INTERPRETING

# Entries of the map of a program, and tokens at least.
ENTRIES, FEWEST = 4096, 16


@triton.jit
def _load(map_ptr, token, expert, num_tokens, experts):
    live = (token < num_tokens) & (expert < experts)
    return tl.load(map_ptr + token * experts + expert, mask=live, other=0).to(tl.int32)


@triton.jit
def _expert_count_kernel(
    map_ptr, counts_ptr, num_tokens, experts, blocks, TOKENS: tl.constexpr, EXPERTS: tl.constexpr
):
    block = tl.program_id(0)
    token = block.to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    expert = tl.arange(0, EXPERTS)
    here = _load(map_ptr, token, expert[None, :], num_tokens, experts)
    tl.store(counts_ptr + expert * blocks + block, tl.sum(here, 0), mask=expert < experts)


@triton.jit
def _expert_routes_kernel(
    map_ptr,
    ends_ptr,
    chosen_ptr,
    tokens_ptr,
    parts_ptr,
    num_tokens,
    experts,
    blocks,
    each,
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,
    EACH: tl.constexpr,
):
    """ends_ptr: of every expert's block of tokens where its parts end, among all."""
    block = tl.program_id(0)
    token = block.to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    expert = tl.arange(0, EXPERTS)[None, :]
    here = _load(map_ptr, token, expert, num_tokens, experts)
    end = tl.load(ends_ptr + expert * blocks + block, mask=expert < experts, other=0)
    place = end - tl.sum(here, 0)[None, :] + tl.cumsum(here, 0) - 1
    number = tl.cumsum(here, 1) - 1
    held = here != 0
    tl.store(chosen_ptr + place, token * experts + expert, mask=held)
    tl.store(tokens_ptr + place, token + expert * 0, mask=held)
    tl.store(parts_ptr + token * each + number, place.to(tl.int32), mask=held & (number < each))
    rest = tl.arange(0, EACH)[None, :]
    missing = (rest >= tl.sum(here, 1)[:, None]) & (rest < each) & (token < num_tokens)
    none = tl.full((TOKENS, EACH), -1, tl.int32)
    tl.store(parts_ptr + token * each + rest, none, mask=missing)


def expert_routes(
    routing_map: torch.Tensor, each: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See reference.py."""
    routing_map, device = routing_map.contiguous(), routing_map.device
    count, experts = routing_map.shape
    width = triton.next_power_of_2(experts)
    tokens = max((1 << 14 if INTERPRETING else ENTRIES) // width, FEWEST)
    blocks = max(triton.cdiv(count, tokens), 1)
    counts = torch.empty(experts * blocks, dtype=torch.int32, device=device)
    chosen, of_tokens = torch.empty(2, count * each, dtype=torch.int64, device=device)
    parts = torch.empty(count, each, dtype=torch.int32, device=device)
    bits = routing_map.view(torch.uint8)
    sizes = {"TOKENS": tokens, "EXPERTS": width, "num_warps": 4}
    _expert_count_kernel[(blocks,)](bits, counts, count, experts, blocks, **sizes)
    ends = counts.cumsum(0)
    _expert_routes_kernel[(blocks,)](
        bits,
        ends,
        chosen,
        of_tokens,
        parts,
        count,
        experts,
        blocks,
        each,
        EACH=triton.next_power_of_2(each),
        **sizes,
    )
    return chosen, of_tokens, parts
