"""This rank's share of the tokens, for layers that are built without a grid."""

from __future__ import annotations

from typing import Any

from megatron.core import parallel_state

from megasparse.sparsity.shard import ALL_TOKENS, TokenShare


def token_share(config: Any) -> TokenShare:
    """By the configuration of the layers; Megatron's groups are up if it divides sequences.

    Args:
        config: megatron-core's, of the layers.
    """
    size = getattr(config, "context_parallel_size", 1)
    if size == 1:
        return ALL_TOKENS
    return TokenShare(parallel_state.get_context_parallel_rank(), size)
