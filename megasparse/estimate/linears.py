"""The GEMMs of a layer on one rank, and how tokens travel to experts: for the time of a step."""

from __future__ import annotations

from dataclasses import dataclass

from megasparse.config import ResolvedConfig, tokens_here
from megasparse.config.shapes import layer_parameters
from megasparse.estimate.gemm_table import GemmTable

SIZE = 2  # bytes of an activation


@dataclass(frozen=True)
class Linear:
    """GEMMs of a rank: `tokens` by inputs K to outputs N, `times` of them (one an expert)."""

    name: str
    tokens: int
    n: int
    k: int
    times: int = 1


def linears(config: ResolvedConfig, layer: int = 0) -> list[Linear]:
    """The linears of a layer; of experts as if tokens came evenly."""
    model, parallel = config.model, config.parallel
    tp, ep = parallel.tensor_model_parallel_size, parallel.expert_model_parallel_size
    tokens = tokens_here(config)
    found = []
    for one in layer_parameters(model, layer):
        if not one.is_linear:
            continue
        n, k = one.local_shape(tp, ep)
        if one.experts == 1:
            found.append(Linear(one.name, tokens, n, k))
            continue
        here = one.experts // ep
        each = max(tokens * model.moe_router_topk // here, 1)
        found.append(Linear(one.name, each, n // here, k, here))
    return found


def layer_kinds(config: ResolvedConfig) -> dict[bool, int]:
    """A layer of each kind there is: with experts or without, and its number."""
    return {experts: number for number, experts in enumerate(config.model.expert_layers)}


def dispatch_seconds(config: ResolvedConfig, table: GemmTable, gpus_per_node: int) -> float:
    """Seconds in which a layer's tokens go to their experts and back, both ways; if they come
    evenly. Gathered instead, all of them go to all ranks."""
    model, parallel = config.model, config.parallel
    tp, ep = parallel.tensor_model_parallel_size, parallel.expert_model_parallel_size
    link = "nvlink" if tp * ep <= gpus_per_node else "network"
    tokens = tokens_here(config) / tp
    copies = model.moe_router_topk if parallel.moe_token_dispatcher_type == "alltoall" else ep
    moved = 4 * SIZE * tokens * copies * model.hidden_size * (ep - 1) / ep
    return table.moving(moved, link) + 4 * table.data["collective_us"] / 1e6


def not_fused(config: ResolvedConfig) -> float:
    """Bytes of what a LLaMA's layer does not have, or has in the kernels of its GEMMs."""
    model, tp = config.model, config.parallel.tensor_model_parallel_size
    tokens = tokens_here(config)
    moved = 0.0
    if not model.gated:  # read and written forward, two read and one written backward
        moved += 5 * SIZE * tokens * model.ffn_hidden_size / tp
    if not model.disable_bias_linear:  # the sums over tokens, at half of a copy's rate
        outputs = sum(one.n for one in linears(config))
        moved += 2 * SIZE * tokens * outputs
    if model.position_embedding_type != "rope":  # q, k and v: copies of strided heads, and a join
        heads = model.num_attention_heads + 2 * model.num_query_groups
        moved += 6 * SIZE * tokens * heads * model.kv_channels / tp
    return moved
