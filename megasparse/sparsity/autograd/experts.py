"""The autograd function of one linear of all experts of a layer: three GEMMs for each of them.

There is no communication in it: tokens are at their experts already, and partial sums over
tensor-parallel ranks are added up where tokens go back.
"""

from __future__ import annotations

from typing import Any

import torch

from megasparse.sparsity.autograd.linear import Seed, asked
from megasparse.sparsity.gemms.experts import Arrivals, ExpertGemms


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TK: torch.Tensor,
        weight: torch.Tensor,
        gemms: ExpertGemms,
        arrivals: Arrivals,
        seed: Seed,
    ) -> torch.Tensor:
        ctx.gemms, ctx.arrivals, ctx.seed = gemms, arrivals, seed
        ctx.save_for_backward(x_TK if ctx.needs_input_grad[1] else None)
        return gemms.output(x_TK, arrivals)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        dz_TN = grads[0].contiguous()
        (x_TK,) = ctx.saved_tensors
        dx, dw = None, None
        if ctx.needs_input_grad[0]:
            dx = ctx.gemms.grad_input(dz_TN, ctx.arrivals)
        if ctx.needs_input_grad[1]:
            dw = ctx.gemms.grad_weight(dz_TN, x_TK, ctx.arrivals, asked(ctx.seed))
        return dx, dw, None, None, None


def expert_linear(
    x_TK: torch.Tensor,
    weight: torch.Tensor,
    gemms: ExpertGemms,
    arrivals: Arrivals,
    seed: Seed = 0,
) -> torch.Tensor:
    """`x_e W~_e^T` of every expert's tokens, with gradients.

    Args:
        x_TK: `(T, K)`, sorted by expert.
        weight: the stacked master weights `(E N, K)`; get the straight-through gradient.
        gemms: operands and GEMMs of the current optimizer step.
        arrivals: which tokens are whose.
        seed: of the layer's MVUE draws in this step, whatever the micro-batch: that is in the
            tokens' places. A function is asked for it in the backward pass, once.

    Returns:
        `(T, N)`.
    """
    return _Experts.apply(x_TK, weight, gemms, arrivals, seed)
