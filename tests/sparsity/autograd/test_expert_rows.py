"""Experts' autograd functions: rows and tokens are each other's adjoint, gradients stand alone."""

from __future__ import annotations

import torch

from megasparse.sparsity.autograd.experts import expert_linear, rows_of_tokens, tokens_of_rows
from megasparse.sparsity.gemms.expert_tokens import Arrivals, ExpertTokens
from megasparse.sparsity.gemms.experts import DenseExpertGemms

COUNTS = [3, 0, 5]


def test_rows_and_tokens_are_adjoint():
    tokens = Arrivals(COUNTS).in_tiles(4, False, torch.device("cpu"))
    x = torch.randn(8, 2, requires_grad=True)
    rows = rows_of_tokens(x, tokens)
    assert rows.shape == (12, 2) and torch.equal(tokens_of_rows(rows, tokens), x)
    dz = torch.randn(12, 2)
    rows.backward(dz)
    assert torch.equal(x.grad, tokens.tokens(dz))
    whole = torch.randn(12, 2, requires_grad=True)
    dy = torch.randn(8, 2)
    tokens_of_rows(whole, tokens).backward(dy)
    assert torch.equal(whole.grad, tokens.rows(dy))
    # Tokens that are rows as they came are not copied.
    assert rows_of_tokens(x, ExpertTokens(COUNTS)) is x
    assert tokens_of_rows(x, ExpertTokens(COUNTS)) is x


def test_each_gradient_alone():
    weight, x = torch.randn(3 * 4, 6, requires_grad=True), torch.randn(8, 6, requires_grad=True)
    dz = torch.randn(8, 4)

    def gradients(x, weight):
        gemms = DenseExpertGemms(3, w_NK=weight)
        z = expert_linear(x, weight, gemms, ExpertTokens(COUNTS), 0)
        wanted = [t for t in (x, weight) if t.requires_grad]
        return torch.autograd.grad(z, wanted, dz)

    dx, dw = gradients(x, weight)
    assert torch.equal(gradients(x, weight.detach())[0], dx)
    assert torch.equal(gradients(x.detach(), weight)[0], dw)
