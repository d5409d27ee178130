"""The autograd function of a feed-forward block in FP8: two linears, an activation between them.

    forward    x = gather(x_local);   h, saved1 = first.output_and_saved(x)
               z, saved2 = second.output_of_activated(h)     of silu(gate) * up, [gate | up] = h
    backward   start gather(x_local)
               g2 = second.prepare_grad_output(dz);  dy = second.grad_input(g2)
               dW2 = of (g2, saved2)
               g1 = first.prepare_activated_grad_output(dy, h)
               dx = first.grad_input(g1);  start reduce(dx)
               wait for x;  dW1 = of (g1, saved1);  wait for dx

What two calls of `linear` with an activation between them compute, to the last bit; but neither the
activation nor the gradient of its input is written in 16 bits: they leave the activation's
kernels as operands of the GEMMs that follow. (Current scales follow from whole tensors: with them
both are computed twice, first for their magnitude alone.) What undoes the scaling of h and dy these
kernels apply as they read them.
"""

from __future__ import annotations

from typing import Any

import torch

from megasparse.kernels import Activation
from megasparse.sparsity.autograd.linear import (
    LinearComm,
    Seed,
    asked,
    deferred_of,
    gathered_output,
    in_graph,
    local_input,
    room_for_sums,
    saved_again,
    start_gather,
    whole_shape,
)
from megasparse.sparsity.autograd.norm import Float8Input
from megasparse.sparsity.gemms.protocol import Deferred, LinearGemms, weight_gradient


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_local: torch.Tensor,
        weight1: torch.Tensor,
        weight2: torch.Tensor,
        bias1: torch.Tensor | None,
        bias2: torch.Tensor | None,
        first: LinearGemms,
        second: LinearGemms,
        comm: LinearComm,
        activation: Activation,
        seeds: tuple[Seed, Seed],
        recorded: bool,
        quantized: Float8Input | None,
    ) -> torch.Tensor:
        ctx.first, ctx.second, ctx.comm, ctx.seeds = first, second, comm, seeds
        ctx.activation = activation
        local = local_input(x_local, comm, quantized)
        save = recorded and ctx.needs_input_grad[1]
        lacks = Deferred()
        x, h_TF, saved1 = gathered_output(
            first, comm, local, quantized, save, weight1.shape[0], bias1, lacks
        )
        ctx.factors, ctx.deferred = lacks.factors, deferred_of(quantized, comm)
        save = recorded and ctx.needs_input_grad[2]
        z_TN, saved2 = second.output_of_activated(h_TF, activation, save, bias2, lacks.factors)
        if comm.gathers:
            saved1 = ()
        ctx.of_first = len(saved1)
        ctx.save_for_backward(local if comm.gathers else None, h_TF, *saved1, *saved2)
        return z_TN.view(*whole_shape(x_local, local, x), z_TN.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (dz,) = grads
        local, h_TF, *saved = ctx.saved_tensors
        saved1, saved2 = tuple(saved[: ctx.of_first]), tuple(saved[ctx.of_first :])
        first, second, comm, wanted = ctx.first, ctx.second, ctx.comm, ctx.needs_input_grad
        dx, dw1, dw2, dy_TF, gathered, wait = None, None, None, None, None, None
        lacks = Deferred()
        if local is not None and wanted[1]:
            gathered = start_gather(comm, local)
        dz_TN = dz.reshape(-1, dz.shape[-1])
        sums1 = room_for_sums(h_TF) if wanted[3] else None
        sums2 = room_for_sums(dz_TN) if wanted[4] else None
        operands = second.prepare_grad_output(dz_TN, asked(ctx.seeds[1]), sums2)
        if wanted[0] or wanted[1] or wanted[3]:
            dy_TF = second.grad_input(operands, lacks)
        if wanted[2]:
            dw2 = weight_gradient(second, operands, saved2)
        if dy_TF is not None:
            operands = first.prepare_activated_grad_output(
                dy_TF,
                h_TF,
                ctx.activation,
                asked(ctx.seeds[0]),
                sums1,
                (lacks.factors, ctx.factors),
            )
            del dy_TF
            if wanted[0]:
                dx_TK = first.grad_input(operands, ctx.deferred)
                dx, wait = comm.reduce(dx_TK.view(*dz.shape[:-1], dx_TK.shape[-1]))
            if wanted[1]:
                if gathered is not None:
                    x, arrived = gathered
                    arrived()
                    saved1 = saved_again(first, x.reshape(-1, x.shape[-1]))
                dw1 = weight_gradient(first, operands, saved1)
        if wait is not None:
            wait()
        db1, db2 = (None if s is None else s.to(dz.dtype) for s in (sums1, sums2))
        return dx, dw1, dw2, db1, db2, None, None, None, None, None, None, None


def feed_forward(
    x: torch.Tensor | Float8Input,
    weights: tuple[torch.Tensor, torch.Tensor],
    gemms: tuple[LinearGemms, LinearGemms],
    comm: LinearComm,
    seeds: tuple[Seed, Seed],
    activation: Activation = "swiglu",
    biases: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
) -> torch.Tensor:
    """`activated(x W1~^T + b1) W2~^T + b2`, with gradients.

    Args:
        x: `(..., K)`, this rank's input, in 8 bits or in full.
        weights: the master weights, `(2 F, K)` and `(N, F)`, `(F, K)` where the activation is not
            gated; get straight-through gradients.
        gemms: of the two layers, of the current optimizer step.
        comm: communication of x and its gradient.
        seeds: of the MVUE draws of the two layers in this micro-batch.
        activation: "swiglu", "geglu" or "gelu".
        biases: of the two layers, `(2 F,)` or `(F,)` and `(N,)`; each may be None.

    Returns:
        `(..., N)`, this rank's part of a sum; the leading dimensions are those of the gathered x.
    """
    recorded = torch.is_grad_enabled()  # inside the function it is off
    x, quantized = in_graph(x)
    return _FeedForward.apply(
        x, *weights, *biases, *gemms, comm, activation, seeds, recorded, quantized
    )
