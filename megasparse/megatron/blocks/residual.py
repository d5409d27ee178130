"""Transformer layers whose sums are others than megatron-core's: norms behind, or two branches.

    pre       h = x + A(N1(x));        h + F(N2(h))             megatron-core's own layer
    post      h = x + N3(A(x));        h + N4(F(h))
    both      h = x + N3(A(N1(x)));    h + N4(F(N2(h)))
    parallel  x + A(N1(x)) + F(N2(x))

A: attention, F: FFN, N: norms.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer

# What megatron-core adds a branch to the residual by: of (x, bias), residual and dropout.
Add = Callable[[tuple[torch.Tensor, torch.Tensor | None], torch.Tensor, float], torch.Tensor]


class ResidualLayer(TransformerLayer):
    """megatron-core's layer with norms behind its branches, or with branches side by side.

    Args:
        args, rest: of TransformerLayer.
        norm_behind: class of the norms of the branches' results; None: there are none.
        parallel: whether the FFN takes the layer's input.
    """

    def __init__(
        self,
        *args: Any,
        norm_behind: Callable[..., torch.nn.Module] | None = None,
        parallel: bool = False,
        **rest: Any,
    ) -> None:
        super().__init__(*args, **rest)
        self._parallel = parallel
        self._input: torch.Tensor | None = None
        if norm_behind is not None:
            sizes = (self.config, self.config.hidden_size, self.config.layernorm_epsilon)
            self.post_self_attn_layernorm = norm_behind(*sizes)
            self.post_mlp_layernorm = norm_behind(*sizes)
            self.self_attn_bda: Any = functools.partial(
                _add_normed, self.post_self_attn_layernorm, self.self_attn_bda
            )
            self.mlp_bda: Any = functools.partial(
                _add_normed, self.post_mlp_layernorm, self.mlp_bda
            )

    def _forward_attention(self, hidden_states: torch.Tensor, *args: Any, **rest: Any) -> Any:
        self._input = hidden_states
        return super()._forward_attention(hidden_states, *args, **rest)

    def _forward_pre_mlp_layernorm(self, hidden_states: torch.Tensor) -> Any:
        given, self._input = self._input, None
        return super()._forward_pre_mlp_layernorm(given if self._parallel else hidden_states)


def _add_normed(
    norm: torch.nn.Module, add: Callable[[bool, bool], Add], training: bool, fused: bool
) -> Add:
    """megatron-core's sum of a branch that is normed first."""
    plain = add(training, fused)

    def run(
        branch: tuple[torch.Tensor, torch.Tensor | None], residual: torch.Tensor, dropout: float
    ) -> torch.Tensor:
        x, bias = branch
        return plain((norm(x if bias is None else x + bias), None), residual, dropout)

    return run
