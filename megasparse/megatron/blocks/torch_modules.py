"""Building blocks of a layer beside its linears: torch's norms and attention, activations."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.utils import is_layer_window_attention

from megasparse.kernels import geglu_fused, swiglu_fused
from megasparse.megatron.context.attention import (
    gather_keys_and_values,
    own_causal_mask,
    query_places,
)


class TorchNorm:
    """Builds a torch LayerNorm or RMSNorm with the constructor that Megatron layers expect.

    Under sequence parallelism each rank sees a slice of the sequence, so gradients of the norm's
    parameters are partial; they are marked for the reduction that completes them.
    """

    def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> Any:
        kind = torch.nn.RMSNorm if config.normalization == "RMSNorm" else torch.nn.LayerNorm
        norm = kind(hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm


class SdpaAttention(torch.nn.Module):
    """Softmax attention by torch's scaled_dot_product_attention: grouped queries, sliding windows.

    With context parallelism queries are this rank's, keys and values are gathered.

    Args: those of megatron-core's DotProductAttention.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        self.causal = attn_mask_type is not AttnMaskType.padding
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.softmax_scale = softmax_scale
        self.sequence_parallel = config.sequence_parallel
        windowed = is_layer_window_attention(
            config.window_size, config.window_attn_skip_freq, layer_number
        )
        self.window = config.window_size[0] + 1 if windowed else None
        shared = getattr(config, "context_parallel_size", 1) > 1
        self.cp_group = parallel_state.get_context_parallel_group() if shared else None

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **_: Any,
    ) -> torch.Tensor:
        """Attention of `(S, B, heads, D)` queries to `(S, B, groups, D)` keys and values.

        Args:
            attention_mask: bool, broadcastable to `(B, 1, S, S)` (its rows this rank's with
                context parallelism), True where attention is forbidden (Megatron's convention);
                None: causal, in an encoder nowhere.

        Returns:
            `(S, B, heads * D)`.
        """
        if self.cp_group is not None:
            key, value = gather_keys_and_values(key, value, self.cp_group)
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        allowed = self._allowed(k.shape[2], q.shape[2], attention_mask, q.device)
        dropout = self.dropout if self.training else 0.0

        def attend() -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=allowed,
                dropout_p=dropout,
                is_causal=self.causal and allowed is None and q.shape[2] > 1,
                scale=self.softmax_scale,
                enable_gqa=q.shape[1] != k.shape[1],
            )

        if dropout > 0.0 and not self.sequence_parallel:
            # Heads are split over ranks: each draws its own dropout. With sequence parallelism the
            # whole layer does already, and a fork within that fork would not be recomputed alike.
            with tensor_parallel.get_cuda_rng_tracker().fork():
                context = attend()
        else:
            context = attend()
        return context.permute(2, 0, 1, 3).flatten(2).contiguous()

    def _allowed(
        self, keys: int, queries: int, mask: torch.Tensor | None, device: torch.device
    ) -> torch.Tensor | None:
        """What the queries may attend to, broadcastable to `(B, heads, queries, keys)`; None: all
        that is not after them."""
        allowed = None if mask is None else ~mask
        group = self.cp_group
        if group is not None and allowed is None and self.causal:
            allowed = own_causal_mask(keys, group, device)
        if self.window is None or keys <= self.window:
            return allowed
        if group is None:
            places = torch.arange(keys - queries, keys, device=device)
        else:
            places = query_places(keys, group.rank(), group.size(), device)
        near = within_window(places, keys, self.window)
        return near if allowed is None else allowed & near


def within_window(places: torch.Tensor, keys: int, window: int) -> torch.Tensor:
    """`(queries, keys)` bool: the last `window` keys up to a query's own place.

    Args:
        places: of the queries, `(queries,)` int64.
        keys: of all places.
    """
    back = places[:, None] - torch.arange(keys, device=places.device)
    return (back >= 0) & (back < window)


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """GPT-2's GELU (tanh form)."""
    return torch.nn.functional.gelu(x, approximate="tanh")


def squared_relu(x: torch.Tensor) -> torch.Tensor:
    """`relu(x)^2`; megatron-core's own is compiled when it is first called, which takes a minute on
    a CPU."""
    return torch.nn.functional.relu(x).square()


class GatedActivation(torch.nn.Module):
    """SwiGLU or GEGLU of a fused projection `[gate | up]`, whose gradient is one tensor too.

    Args:
        config: of the layers; its `activation_func` is torch's silu, or gelu for GEGLU.

    Attributes:
        gelu: whether it is GEGLU, in its tanh form.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.gelu = config.activation_func is torch.nn.functional.gelu

    def forward(self, fused: torch.Tensor) -> torch.Tensor:
        """`(..., 2 F)` -> `silu(gate) * up` or `gelu(gate) * up`, `(..., F)`."""
        return geglu_fused(fused) if self.gelu else swiglu_fused(fused)

    def sharded_state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        """Nothing to save; megatron-core's MLP asks each of its parts."""
        return {}
