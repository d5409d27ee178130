"""The autograd functions of experts: rows of tokens for their GEMMs, and a linear of all of them.

There is no communication here: tokens are at their experts already, and partial sums over
tensor-parallel ranks are added up where tokens go back.
"""

from __future__ import annotations

from typing import Any

import torch

from megasparse.sparsity.autograd.linear import Seed, asked
from megasparse.sparsity.gemms.expert_tokens import ExpertTokens
from megasparse.sparsity.gemms.experts import ExpertGemms


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, tokens: ExpertTokens) -> torch.Tensor:
        ctx.tokens = tokens
        return tokens.rows(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return ctx.tokens.tokens(grads[0]), None


class _Tokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, tokens: ExpertTokens) -> torch.Tensor:
        ctx.tokens = tokens
        return tokens.tokens(rows)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return ctx.tokens.rows(grads[0]), None


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
            dw = ctx.gemms.grad_weight(operands, ctx.saved_tensors)
        return dx, dw, None, None, None


def rows_of_tokens(x: torch.Tensor, tokens: ExpertTokens) -> torch.Tensor:
    """`x (T, ...)` of the tokens as the rows `(T', ...)` of the GEMMs, with gradients."""
    return x if tokens.spots is None else _Rows.apply(x, tokens)


def tokens_of_rows(rows: torch.Tensor, tokens: ExpertTokens) -> torch.Tensor:
    """The reverse, `(T, ...)`."""
    return rows if tokens.spots is None else _Tokens.apply(rows, tokens)


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
