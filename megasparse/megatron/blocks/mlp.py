"""MLPs whose linears are both in FP8: computed as one, so that operands need no detour."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core.transformer.mlp import MLP

from megasparse.kernels import Activation, activated
from megasparse.megatron.blocks.torch_modules import GatedActivation, gelu_tanh
from megasparse.megatron.parallel_linear import SparseColumnParallelLinear, SparseRowParallelLinear
from megasparse.sparsity.autograd.feed_forward import feed_forward
from megasparse.sparsity.autograd.norm import Float8Input


class Fp8MLP(MLP):
    """megatron-core's MLP with `feed_forward` in place of its three parts one by one.

    The results are the same to the last bit. Someone who looks at the linears, by a hook, sees them
    called one by one.
    """

    kernel_activation: Activation

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
        bias2 = second.bias_of_gemm()
        z = feed_forward(
            hidden_states,
            (first.weight, second.weight),
            (gemms1, gemms2),
            first.comm,
            (seed1, seed2),
            self.kernel_activation,
            (first.bias, bias2),
        )
        return (z, None) if bias2 is not None else second.finish(z)


def fuse_mlps(model: torch.nn.Module) -> int:
    """Make `Fp8MLP`s of the MLPs that can be; their number.

    Their class changes and little else (as in torch's parametrisations): a Transformer layer gives
    its process groups to no other class than MLP itself.
    """
    fused = 0
    for module in model.modules():
        activation = _known_activation(module) if type(module) is MLP else None
        if activation is not None and _fits(module):
            module.__class__ = Fp8MLP
            mlp: Any = module
            mlp.kernel_activation = activation
            if activation == "gelu":  # one by one too, the same bits
                mlp.activation_func = partial(activated, activation="gelu")
            fused += 1
    return fused


def _known_activation(mlp: MLP) -> Activation | None:
    """The name under which kernels know an MLP's activation."""
    if isinstance(mlp.activation_func, GatedActivation):
        return "geglu" if mlp.activation_func.gelu else "swiglu"
    return "gelu" if mlp.activation_func is gelu_tanh else None


def _fits(mlp: MLP) -> bool:
    """Two linears of this package that are in FP8 and nothing more: low-rank branches and Wanda's
    figures want inputs in full, and a bias belongs to the GEMM."""
    first, second = mlp.linear_fc1, mlp.linear_fc2
    return (
        isinstance(first, SparseColumnParallelLinear)
        and isinstance(second, SparseRowParallelLinear)
        and first.in_fp8_alone
        and second.in_fp8_alone
        and (first.bias is None or first.bias_of_gemm() is not None)
        and not first.gather_output
        and second.input_is_parallel
    )
