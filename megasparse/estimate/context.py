"""What context parallelism exchanges: keys and values of the other ranks, and gradients of both.

Transformer Engine's attention passes them from rank to rank while it computes with those it has
(p2p), or gathers them first (all_gather). In the backward pass keys and values travel again, and
their gradients travel home. The bytes are counted; no time of it was measured.
"""

from __future__ import annotations

from megasparse.config import ResolvedConfig, tokens_here

SIZE = 2  # bytes of bf16
# Passes of keys and values over the ranks: forward, backward, and of their gradients.
TRIPS = 3


def keys_and_values(config: ResolvedConfig, size: int = SIZE) -> int:
    """Bytes of a rank's own keys and values of one layer and micro-batch."""
    model = config.model
    width = model.num_query_groups * model.kv_channels // config.parallel.tensor_model_parallel_size
    return 2 * size * tokens_here(config) * width


def exchanged(config: ResolvedConfig) -> int:
    """Bytes that a rank sends in one layer for one micro-batch, both ways."""
    return TRIPS * (config.parallel.context_parallel_size - 1) * keys_and_values(config)


def exposed_seconds(config: ResolvedConfig, travelling: float, attention: float) -> float:
    """Seconds of the exchange in which nothing is computed.

    Args:
        travelling: seconds of the exchange.
        attention: of attention, both ways.
    """
    if config.parallel.cp_comm_type == "all_gather":
        return travelling
    # The last part of attention has nothing left to wait for.
    size = config.parallel.context_parallel_size
    return max(travelling - attention * (size - 1) / size, 0.0)


def buffers(config: ResolvedConfig, size: int = SIZE) -> int:
    """Bytes of what is received: keys and values twice and their gradients twice (p2p), or those of
    the whole sequence."""
    ranks = config.parallel.context_parallel_size
    if ranks == 1:
        return 0
    times = 4 if config.parallel.cp_comm_type == "p2p" else 2 * ranks
    return times * keys_and_values(config, size)
