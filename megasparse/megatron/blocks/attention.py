"""Self-attention whose queries, keys and values leave the fused projection rotated."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp

from megasparse.kernels import Heads, rotary_qkv, split_qkv
from megasparse.megatron.parallel_linear import SparseColumnParallelLinear


class RotaryQkvAttention(SelfAttention):
    """megatron-core's SelfAttention with one pass in place of split, copies and two rotations.

    Without rotation the split is views, and its gradient one pass.

    Where something else is wanted of queries and keys (a cache, packed sequences, norms of their
    own, rotation of a part of the channels) it is megatron-core's alone.
    """

    _angles: torch.Tensor | None = None
    _plain = False

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *args: Any,
        rotary_pos_emb: torch.Tensor | None = None,
        **rest: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`(S, B, H)` to the same, and the projection's bias.

        Args:
            rotary_pos_emb: angles, float32 (S, 1, 1, D).
        """
        self._plain = not args and self._is_plain(rest)
        if self._plain and self._rotates(rotary_pos_emb):
            self._angles, rotary_pos_emb = rotary_pos_emb, None
        try:
            return super().forward(
                hidden_states, attention_mask, *args, rotary_pos_emb=rotary_pos_emb, **rest
            )
        finally:
            self._angles, self._plain = None, False

    def get_query_key_value_tensors(self, *args: Any, **rest: Any) -> Any:
        """q (S, B, heads, D), k and v (S, B, groups, D) of this rank."""
        if not self._plain:
            return super().get_query_key_value_tensors(*args, **rest)
        factors = None
        if self._angles is not None and isinstance(self.linear_qkv, SparseColumnParallelLinear):
            fused, factors = self.linear_qkv.lacking_output(*args[:1])
        else:
            fused, _ = self.linear_qkv(*args[:1])
        groups = self.num_query_groups_per_partition
        heads = Heads(
            groups,
            self.num_attention_heads_per_partition // groups,
            self.hidden_size_per_attention_head,
        )
        if self._angles is None:
            return split_qkv(fused, heads)
        return rotary_qkv(fused, self._angles, heads, factors=factors)

    def _rotates(self, angles: Any) -> bool:
        return (
            isinstance(angles, torch.Tensor)
            and angles.shape[-1] == self.hidden_size_per_attention_head
            and not self.config.rotary_interleaved
            and not (self.config.no_rope_freq or [0] * self.layer_number)[self.layer_number - 1]
        )

    def _is_plain(self, rest: dict[str, Any]) -> bool:
        """Whether q, k and v are what leaves the projection, and nothing else is asked of them."""
        names = ("inference_context", "inference_params", "packed_seq_params", "key_value_states")
        plain = (type(None), IdentityOp)
        return (
            all(rest.get(name) is None for name in names)
            and isinstance(self.q_layernorm, plain)
            and isinstance(self.k_layernorm, plain)
            and self.hidden_size_per_attention_head % 2 == 0
        )
