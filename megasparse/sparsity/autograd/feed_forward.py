"""The autograd function of a gated feed-forward block in FP8: two linears and SwiGLU between them.

    forward    x = gather(x_local);   [gate | up], saved1 = first.output_and_saved(x)
               z, saved2 = second.output_of_gated([gate | up])     of silu(gate) * up
    backward   start gather(x_local)
               g2 = second.prepare_grad_output(dz);  dy = second.grad_input(g2)
               dW2 = of (g2, saved2)
               g1 = first.prepare_gated_grad_output(dy, [gate | up])
               dx = first.grad_input(g1);  start reduce(dx)
               wait for x;  dW1 = of (g1, saved1);  wait for dx

What two calls of `linear` with an activation between them compute, to the last bit; but neither the
activation nor the gradient of [gate | up] is written in 16 bits: they leave the activation's
kernels as operands of the GEMMs that follow. (Current scales follow from whole tensors: with them
both are written, and quantized after that.)
"""

from __future__ import annotations

from typing import Any

import torch

from megasparse.sparsity.autograd.linear import (
    LinearComm,
    Seed,
    asked,
    gathered_output,
    in_graph,
    local_input,
    saved_again,
    start_gather,
    whole_shape,
)
from megasparse.sparsity.autograd.norm import Float8Input
from megasparse.sparsity.gemms.protocol import LinearGemms, weight_gradient


class _GatedFeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_local: torch.Tensor,
        weight1: torch.Tensor,
        weight2: torch.Tensor,
        first: LinearGemms,
        second: LinearGemms,
        comm: LinearComm,
        seeds: tuple[Seed, Seed],
        recorded: bool,
        quantized: Float8Input | None,
    ) -> torch.Tensor:
        ctx.first, ctx.second, ctx.comm, ctx.seeds = first, second, comm, seeds
        local = local_input(x_local, comm, quantized)
        save = recorded and ctx.needs_input_grad[1]
        x, fused_TF, saved1 = gathered_output(first, comm, local, quantized, save, weight1.shape[0])
        z_TN, saved2 = second.output_of_gated(fused_TF, recorded and ctx.needs_input_grad[2])
        if comm.gathers:
            saved1 = ()
        ctx.of_first = len(saved1)
        ctx.save_for_backward(local if comm.gathers else None, fused_TF, *saved1, *saved2)
        return z_TN.view(*whole_shape(x_local, local, x), z_TN.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (dz,) = grads
        local, fused_TF, *saved = ctx.saved_tensors
        saved1, saved2 = tuple(saved[: ctx.of_first]), tuple(saved[ctx.of_first :])
        first, second, comm, wanted = ctx.first, ctx.second, ctx.comm, ctx.needs_input_grad
        dx, dw1, dw2, dy_TF, gathered, wait = None, None, None, None, None, None
        if local is not None and wanted[1]:
            gathered = start_gather(comm, local)
        operands = second.prepare_grad_output(dz.reshape(-1, dz.shape[-1]), asked(ctx.seeds[1]))
        if wanted[0] or wanted[1]:
            dy_TF = second.grad_input(operands)
        if wanted[2]:
            dw2 = weight_gradient(second, operands, saved2)
        if dy_TF is not None:
            operands = first.prepare_gated_grad_output(dy_TF, fused_TF, asked(ctx.seeds[0]))
            del dy_TF
            if wanted[0]:
                dx_TK = first.grad_input(operands)
                dx, wait = comm.reduce(dx_TK.view(*dz.shape[:-1], dx_TK.shape[-1]))
            if wanted[1]:
                if gathered is not None:
                    x, arrived = gathered
                    arrived()
                    saved1 = saved_again(first, x.reshape(-1, x.shape[-1]))
                dw1 = weight_gradient(first, operands, saved1)
        if wait is not None:
            wait()
        return dx, dw1, dw2, None, None, None, None, None, None


def gated_feed_forward(
    x: torch.Tensor | Float8Input,
    weights: tuple[torch.Tensor, torch.Tensor],
    gemms: tuple[LinearGemms, LinearGemms],
    comm: LinearComm,
    seeds: tuple[Seed, Seed] = (0, 0),
) -> torch.Tensor:
    """`(silu(gate) * up) W2~^T` of `[gate | up] = x W1~^T`, with gradients.

    Args:
        x: `(..., K)`, this rank's input, in 8 bits or in full.
        weights: the master weights, `(2 F, K)` and `(N, F)`; get straight-through gradients.
        gemms: of the two layers, of the current optimizer step.
        comm: communication of x and its gradient.
        seeds: of the MVUE draws of the two layers in this micro-batch.

    Returns:
        `(..., N)`, this rank's part of a sum; the leading dimensions are those of the gathered x.
    """
    recorded = torch.is_grad_enabled()  # inside the function it is off
    x, quantized = in_graph(x)
    return _GatedFeedForward.apply(x, *weights, *gemms, comm, seeds, recorded, quantized)
