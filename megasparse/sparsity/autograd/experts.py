"""The autograd functions of experts: all they compute with the tokens that have come, in one.

    forward    h, saved1 = first.output_of_tokens(x)
               z, saved2 = second.output_of_activated(h, p)   of p activation(h)
    backward   g2 = second.prepare_grad_output(dz);  dy = second.grad_input(g2)
               dW2 = of (g2, saved2)
               dh, dp = weighted_activation_backward(dy, h, p)
               g1 = first.prepare_grad_output(dh);  dx = first.grad_input(g1)
               dW1 = of (g1, saved1)

What the parts one by one compute (`rows_of_tokens`, `expert_linear`, an activation times the
probability, `tokens_of_rows`), to the last bit; but neither rows nor the activation need be there
in 16 bits: GEMMs in FP8 make their operands of them by the way.

There is no communication here: tokens are at their experts already, and partial sums over
tensor-parallel ranks are added up where tokens go back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megasparse.kernels import Activation, weighted_activation_backward
from megasparse.sparsity.autograd.linear import Seed, asked
from megasparse.sparsity.gemms.expert_tokens import ExpertTokens
from megasparse.sparsity.gemms.experts import ExpertGemms
from megasparse.sparsity.gemms.protocol import weight_gradient

Move = Callable[[torch.Tensor], torch.Tensor]


class _Moved(torch.autograd.Function):
    """Tokens that are laid out otherwise; their gradients go the reverse way."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, there: Move, back: Move) -> torch.Tensor:
        ctx.back = back
        return there(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return ctx.back(grads[0]), None, None


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TK: torch.Tensor,
        weight: torch.Tensor,
        gemms: ExpertGemms,
        tokens: ExpertTokens,
        seed: Seed,
    ) -> torch.Tensor:
        ctx.gemms, ctx.tokens, ctx.seed = gemms, tokens, seed
        if not ctx.needs_input_grad[1]:
            return gemms.output(x_TK, tokens)
        z_TN, saved = gemms.output_and_saved(x_TK, tokens)
        ctx.save_for_backward(*saved)
        return z_TN

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        dx, dw = None, None
        operands = ctx.gemms.prepare_grad_output(grads[0].contiguous(), ctx.tokens, asked(ctx.seed))
        if ctx.needs_input_grad[0]:
            dx = ctx.gemms.grad_input(operands)
        if ctx.needs_input_grad[1]:
            dw = weight_gradient(ctx.gemms, operands, ctx.saved_tensors)
        return dx, dw, None, None, None


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TK: torch.Tensor,
        weights_T: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        first: ExpertGemms,
        second: ExpertGemms,
        tokens: ExpertTokens,
        activation: Activation,
        seeds: tuple[Seed, Seed],
        recorded: bool,
    ) -> torch.Tensor:
        ctx.first, ctx.second, ctx.tokens, ctx.seeds = first, second, tokens, seeds
        ctx.activation = activation
        wanted = ctx.needs_input_grad
        h_TF, saved1 = first.output_of_tokens(x_TK, tokens, recorded and wanted[2])
        weights = tokens.rows_of_weights(weights_T)
        z_TN, saved2 = second.output_of_activated(
            h_TF, weights, activation, tokens, recorded and wanted[3]
        )
        ctx.of_first = len(saved1)
        ctx.save_for_backward(h_TF, weights, *saved1, *saved2)
        return tokens.tokens(z_TN)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        h_TF, weights, *saved = ctx.saved_tensors
        first, second, tokens, wanted = ctx.first, ctx.second, ctx.tokens, ctx.needs_input_grad
        dx, dweights, dw1, dw2 = None, None, None, None
        dz_TN = tokens.rows(grads[0].contiguous())
        operands = second.prepare_grad_output(dz_TN, tokens, asked(ctx.seeds[1]))
        del dz_TN
        dy_TF = second.grad_input(operands) if any(wanted[:3]) else None
        if wanted[3]:
            dw2 = weight_gradient(second, operands, tuple(saved[ctx.of_first :]))
        if dy_TF is not None:
            dh_TF, dweights = weighted_activation_backward(dy_TF, h_TF, weights, ctx.activation)
            dweights = tokens.weights_of_rows(dweights) if wanted[1] else None
            del dy_TF, h_TF
            operands = first.prepare_grad_output(dh_TF, tokens, asked(ctx.seeds[0]))
            del dh_TF
            if wanted[0]:
                dx = tokens.tokens(first.grad_input(operands))
            if wanted[2]:
                dw1 = weight_gradient(first, operands, tuple(saved[: ctx.of_first]))
        return dx, dweights, dw1, dw2, None, None, None, None, None, None


def rows_of_tokens(x: torch.Tensor, tokens: ExpertTokens) -> torch.Tensor:
    """`x (T, ...)` of the tokens as the rows `(T', ...)` of the GEMMs, with gradients."""
    return x if tokens.spots is None else _Moved.apply(x, tokens.rows, tokens.tokens)


def rows_of_weights(weights: torch.Tensor, tokens: ExpertTokens) -> torch.Tensor:
    """The same of `(n,)`, one weight for everything that came."""
    if tokens.spots is None:
        return weights
    return _Moved.apply(weights, tokens.rows_of_weights, tokens.weights_of_rows)


def tokens_of_rows(rows: torch.Tensor, tokens: ExpertTokens) -> torch.Tensor:
    """The reverse, `(T, ...)`: of a token's rows the sum."""
    return rows if tokens.spots is None else _Moved.apply(rows, tokens.tokens, tokens.rows)


def expert_linear(
    x_TK: torch.Tensor,
    weight: torch.Tensor,
    gemms: ExpertGemms,
    tokens: ExpertTokens,
    seed: Seed,
) -> torch.Tensor:
    """`x_e W~_e^T` of every expert's rows, with gradients.

    Args:
        x_TK: `(T', K)`, rows as `tokens` says.
        weight: the stacked master weights `(E N, K)`; get the straight-through gradient.
        gemms: operands and GEMMs of the current optimizer step.
        tokens: which rows are whose; in tiles of `gemms.tile`.
        seed: of the layer's MVUE draws in this step, whatever the micro-batch: that is in the
            tokens' places. A function is asked for it in the backward pass, once.

    Returns:
        `(T', N)`.
    """
    return _Experts.apply(x_TK, weight, gemms, tokens, seed)


def expert_feed_forward(
    x_TK: torch.Tensor,
    weights_T: torch.Tensor,
    weights: tuple[torch.Tensor, torch.Tensor],
    gemms: tuple[ExpertGemms, ExpertGemms],
    tokens: ExpertTokens,
    seeds: tuple[Seed, Seed] = (0, 0),
    activation: Activation = "swiglu",
) -> torch.Tensor:
    """`(p activation(x_e W1~_e^T)) W2~_e^T` of every expert's tokens, with gradients.

    Args:
        x_TK: `(T, K)`, the tokens as they have come.
        weights_T: `(n,)`, p of each; of tokens that came once for all of their experts one for
            each of these.
        weights: the stacked master weights, `(E 2 F, K)` and `(E N, F)`, `(E F, K)` where the
            activation is not gated; get straight-through gradients.
        gemms: of the two, of the current optimizer step.
        tokens: the rows that they read; in tiles of both.
        seeds: of their draws, as of `expert_linear`.
        activation: "swiglu", "geglu" or "gelu".

    Returns:
        `(T, N)`.
    """
    recorded = torch.is_grad_enabled()  # inside the function it is off
    return _FeedForward.apply(
        x_TK, weights_T, *weights, *gemms, tokens, activation, seeds, recorded
    )
