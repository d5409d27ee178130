"""One-shot pruning of a matrix: masks and errors, against the definitions."""

from __future__ import annotations

import itertools

import pytest
import torch

from megasparse.compress.oneshot import METHODS, prune
from megasparse.errors import NumericsError
from megasparse.kernels import is_24


def _layer(rows=12, columns=32, tokens=400, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) * 0.4 + torch.eye(columns)
    x = torch.randn(tokens, columns, generator=generator) @ mix
    x *= torch.logspace(-1, 1, columns)  # channels of very different size
    return torch.randn(rows, columns, generator=generator), x


def _error(w, pruned, x):
    return float(((w - pruned) @ x.t()).square().sum())


def test_every_method_is_24_and_each_better_than_the_one_before():
    errors = []
    weight, x = _layer()
    for method in METHODS:
        pruned, mask = prune(weight, method, x.t() @ x)
        assert is_24(pruned) and torch.equal(mask.sum(1), torch.full((12,), 16))
        assert not pruned[~mask].any()
        if method != "sparsegpt":
            assert torch.equal(pruned[mask], weight[mask])
        errors.append(_error(weight, pruned, x))
    assert errors[0] > errors[1] > errors[2], errors


def test_wanda_chooses_by_weight_times_norm():
    weight, x = _layer()
    _, mask = prune(weight, "wanda", x.t() @ x)
    scores = (weight.abs() * x.norm(dim=0)).view(12, -1, 4)
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(2, scores.topk(2, 2).indices, True)
    assert torch.equal(mask, kept.view(12, 32))


def test_sparsegpt_equals_column_by_column_updates():
    """The blocks are an arrangement: a plain loop over the columns gives the same."""
    weight, x = _layer(rows=5, columns=264)
    gram = x.t() @ x
    pruned, mask = prune(weight, "sparsegpt", gram)
    g = gram.double() + 0.01 * float(gram.diagonal().mean()) * torch.eye(264)
    u = torch.linalg.cholesky(torch.linalg.inv(g), upper=True)
    w = weight.double().clone()
    for j in range(264):
        if j % 4 == 0:
            scores = (w[:, j : j + 4] / u.diagonal()[j : j + 4]).abs()
            chosen = scores.topk(2, 1).indices.sort(1).values
            expected = mask[:, j : j + 4].nonzero()[:, 1].view(5, 2)
            assert torch.equal(chosen, expected), j
        error = torch.where(mask[:, j], 0.0, w[:, j]) / u[j, j]
        w[:, j:] -= torch.outer(error, u[j, j:])
    torch.testing.assert_close(pruned.double(), torch.where(mask, w, 0.0), rtol=1e-3, atol=1e-3)


def test_dead_inputs_and_a_matrix_that_cannot_be_inverted():
    weight, x = _layer()
    x[:, 5] = 0
    pruned, _ = prune(weight, "sparsegpt", x.t() @ x)
    assert torch.isfinite(pruned).all() and not pruned[:, 5].any()
    bad = -torch.ones(32, 32)
    bad.fill_diagonal_(1.0)
    with pytest.raises(NumericsError, match="not positive definite"):
        prune(weight, "sparsegpt", bad)


def test_magnitude_keeps_the_pair_with_the_largest_sum():
    weight, _ = _layer(rows=3, columns=8)
    pruned, _ = prune(weight, "magnitude")
    for before, after in zip(weight.view(-1, 4), pruned.view(-1, 4), strict=True):
        best = max(
            sum(abs(before[i]) for i in pair) for pair in itertools.combinations(range(4), 2)
        )
        assert float(after.abs().sum()) == pytest.approx(best)
