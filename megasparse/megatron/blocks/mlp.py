"""Gated MLPs whose linears are both in FP8: computed as one, so that operands need no detour."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.mlp import MLP

from megasparse.megatron.blocks.torch_modules import GatedActivation
from megasparse.megatron.parallel_linear import SparseColumnParallelLinear, SparseRowParallelLinear
from megasparse.sparsity.autograd.feed_forward import gated_feed_forward
from megasparse.sparsity.autograd.norm import Float8Input


class Fp8GatedMLP(MLP):
    """megatron-core's MLP with `gated_feed_forward` in place of its three parts one by one.

    The results are the same to the last bit. Someone who looks at the linears, by a hook, sees them
    called one by one.
    """

    def forward(
        self,
        hidden_states: torch.Tensor | Float8Input,
        per_token_scale: torch.Tensor | None = None,
        **rest: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`(S, B, H)`, with sequence parallelism `(S/p, B, H)`, to the same; and fc2's bias."""
        first, second = self.linear_fc1, self.linear_fc2
        watched = any(m._forward_hooks or m._forward_pre_hooks for m in (first, second))
        if per_token_scale is not None or watched:
            return super().forward(hidden_states, per_token_scale, **rest)
        (gemms1, seed1), (gemms2, seed2) = first.current_gemms(), second.current_gemms()
        z = gated_feed_forward(
            hidden_states,
            (first.weight, second.weight),
            (gemms1, gemms2),
            first.comm,
            (seed1, seed2),
        )
        return second.finish(z)


def fuse_gated_mlps(model: torch.nn.Module) -> int:
    """Make `Fp8GatedMLP`s of the MLPs that can be; their number.

    Their class changes and nothing else (as in torch's parametrisations): a Transformer layer gives
    its process groups to no other class than MLP itself.
    """
    fused = 0
    for module in model.modules():
        if type(module) is MLP and _fits(module):
            module.__class__ = Fp8GatedMLP
            fused += 1
    return fused


def _fits(mlp: MLP) -> bool:
    """SwiGLU between two linears of this package that are in FP8 and nothing more: low-rank
    branches and Wanda's figures want inputs in full, fc1's bias the gradient of its output."""
    first, second = mlp.linear_fc1, mlp.linear_fc2
    return (
        isinstance(mlp.activation_func, GatedActivation)
        and not mlp.activation_func.gelu
        and isinstance(first, SparseColumnParallelLinear)
        and isinstance(second, SparseRowParallelLinear)
        and first.in_fp8_alone
        and second.in_fp8_alone
        and first.bias is None
        and not first.gather_output
        and second.input_is_parallel
    )
