"""The variance of MVUE without a draw: both backends against the formulas in float64."""

from __future__ import annotations

import itertools

import pytest
import torch

from megasparse.errors import KernelError
from megasparse.kernels import mvue24, mvue24_squares, mvue24_variance
from megasparse.kernels.mvue24 import triton_squares as fast
from tests.kernels.poison import poison_new_tensors
from tests.kernels.test_mvue24 import heavy_tailed

BACKENDS = ["reference", "triton"]
# Ragged along both, smaller than a group, more than one of the interpreter's tiles.
SHAPES = [(64, 128), (1, 1), (7, 130), (131, 6), (3, 1028), (1030, 261)]
WAYS = [(0, False), (1, False), (0, True), (1, True)]


def by_definition(g, dim, exact, strided):
    """float64 (2,): |g|^2 and the sum of x_i^2 / p_i - x_i^2, by README.md's probabilities."""
    x = g.double().t() if dim == 1 else g.double()
    x = torch.cat([x, x.new_zeros(-len(x) % 4, x.shape[1])])
    a = (x.unflatten(0, (4, -1)) if strided else x.unflatten(0, (-1, 4)).transpose(0, 1)).abs()
    total, largest = a.sum(0), a.amax(0)
    if exact:
        rest = total - largest
        p = torch.minimum(a, rest) * 2 / (rest + torch.minimum(largest, rest))
        p = torch.where(rest == 0, 1.0, p)
    else:
        others = total - a
        odds = torch.where(a > 0, a / others, 0.0)
        odds = torch.where(others > 0, odds, 0.0)
        p = torch.where(total > 0, a / total, 1.0) * (1 + odds.sum(0) - odds)
    variance = torch.where(a > 0, a.square() / p - a.square(), 0.0)
    return torch.stack([a.square().sum(), variance.sum()])


def check(found, g, backend, dim, exact, strided):
    """The definition's square is a float32 sum, which the variance is a difference from."""
    expected = by_definition(g, dim, exact, strided).tolist()
    close = {"rel": 1e-5, "abs": 1e-4 * expected[0] if backend == "reference" else 1e-12}
    assert found.shape == (2,) and found.dtype == torch.float64
    assert found.tolist() == pytest.approx(expected, **close)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_squares_are_those_of_the_formulas(device, dtype, exact, backend, monkeypatch):
    poison_new_tensors(monkeypatch)
    for shape, (dim, strided) in itertools.product(SHAPES, WAYS):
        g = heavy_tailed(shape, device, dtype)
        found = mvue24_squares(g, dim=dim, exact=exact, strided=strided, backend=backend)
        check(found, g, backend, dim, exact, strided)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("exact", [True, False])
def test_any_strides(device, exact, backend):
    part = heavy_tailed((24, 80), device)[:, 3:55]
    apart = heavy_tailed((24, 104), device)[:, ::2]
    for dim, strided in WAYS:
        how = {"exact": exact, "strided": strided, "backend": backend}
        for g in (part, part.t().contiguous().t(), apart):
            check(mvue24_squares(g, dim=dim, **how), g, backend, dim, exact, strided)
        turned = mvue24_variance(part.t(), dim=1 - dim, **how)
        assert float(turned) == pytest.approx(
            float(mvue24_variance(part, dim=dim, **how)), rel=1e-4
        )


@pytest.mark.parametrize("exact", [True, False])
def test_small_gradients_have_the_variance_of_large_ones(device, exact):
    """Whose squares no float32 has."""
    g = heavy_tailed((64, 96), device).clamp(-8, 8)
    g = g.masked_fill(g.abs() < 2.0**-9, 0.0)
    square, variance = mvue24_squares(g, dim=0, exact=exact, backend="triton").tolist()
    for power in (-100, -60, 60):
        found = mvue24_squares(g * 2.0**power, dim=0, exact=exact, backend="triton")
        assert found.tolist() == pytest.approx(
            [square * 4.0**power, variance * 4.0**power], rel=1e-6
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("exact", [True, False])
def test_groups_without_a_choice_and_odd_numbers(device, exact, backend):
    g = torch.zeros(16, 8, device=device)
    assert mvue24_squares(g, dim=0, exact=exact, backend=backend).tolist() == [0.0, 0.0]
    g[3], g[9, 2], g[14, 5] = 2.0, -3.7, 1e-30  # at most one of a group
    square, variance = mvue24_squares(g, dim=0, exact=exact, backend=backend).tolist()
    assert square == pytest.approx(8 * 4 + 3.7**2) and variance == pytest.approx(0, abs=1e-5)
    assert mvue24_squares(g[:0], dim=0, exact=exact, backend=backend).tolist() == [0.0, 0.0]
    for odd in (float("nan"), float("inf")):
        g[8, 2] = odd
        assert not mvue24_squares(g, dim=0, exact=exact, backend=backend).isfinite().any()


def test_the_variance_is_that_of_the_kernels_draws(device):
    """Of many draws by the other kernel of the same backend."""
    g = heavy_tailed((32, 24), device).repeat(1, 800)
    for exact in (True, False):
        out = mvue24(g, seed=11, dim=0, exact=exact, backend="triton")
        each = (out - g).double().square().view(32, 800, 24).sum((0, 2))
        variance = float(mvue24_variance(g[:, :24], dim=0, exact=exact, backend="triton"))
        assert abs(float(each.mean()) - variance) < 5 * float(each.std()) / 800**0.5


def test_programs_walk_over_their_tiles(device, monkeypatch):
    monkeypatch.setattr(fast, "INTERPRETED", fast.Tile(rows=2, columns=32, num_warps=4))
    monkeypatch.setattr(fast, "MAX_PROGRAMS", 7)
    for dim, strided in ((0, False), (0, True), (1, False)):
        g = heavy_tailed((70, 130), device, torch.bfloat16)
        first, again = (mvue24_squares(g, dim=dim, strided=strided, backend="triton") for _ in "12")
        expected = by_definition(g, dim, True, strided).tolist()
        assert torch.equal(first, again) and first.tolist() == pytest.approx(expected, rel=1e-9)


def test_refusals(device):
    g = torch.ones(4, 4, device=device)
    with pytest.raises(KernelError, match="g has shape"):
        mvue24_squares(g[0])
    with pytest.raises(KernelError, match="expected one of reference, triton"):
        mvue24_variance(g, backend="cusparselt")


@pytest.mark.gpu
@pytest.mark.parametrize("exact", [True, False])
def test_a_large_gradient_on_a_gpu(device, exact):
    """Backends agree at a size with all programs busy; repeated the bits are the same."""
    g = (torch.randn(4096, 14336, device=device) * 1e-6).bfloat16()
    for dim, strided in WAYS:
        how = {"dim": dim, "exact": exact, "strided": strided}
        first, again = (mvue24_squares(g, **how, backend="triton") for _ in range(2))
        assert torch.equal(first, again)
        check(first, g, "triton", **how)
        check(mvue24_squares(g, **how, backend="reference"), g, "reference", **how)
