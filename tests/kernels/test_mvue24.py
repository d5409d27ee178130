"""MVUE: statistics, structure, reproducibility; Triton equals the reference."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from megasparse.errors import KernelError
from megasparse.kernels import mvue24
from tests.kernels.poison import poison_new_tensors

BACKENDS = ["reference", "triton"]
SHAPES = [(64, 128), (4, 4), (1, 1), (7, 130), (129, 6), (3, 1028)]


def heavy_tailed(shape, device, dtype=torch.float32, seed=0):
    """Normal numbers times exponentials of normals: a third of the groups has a dominant entry."""
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(shape, generator=generator)
    g = g * torch.randn(shape, generator=generator).mul(1.5).exp()
    g[torch.rand(shape, generator=generator) < 0.1] = 0.0
    return g.to(device, dtype)


def groups_of(t, dim):
    """(groups, 4) of a tensor whose size along `dim` is a multiple of 4."""
    return (t if dim == 1 else t.t()).reshape(-1, 4)


def assert_equal_enough(result, expected, exact):
    """Same entries kept, same signs; values bit for bit unless hardware or interpreter round."""
    result, expected = result.cpu(), expected.cpu()
    assert torch.equal(result == 0, expected == 0)
    interpreted = not torch.cuda.is_available()
    if result.dtype == torch.bfloat16 and interpreted:  # the interpreter truncates
        torch.testing.assert_close(result, expected, rtol=2**-7, atol=0)
    elif exact:
        assert torch.equal(result, expected)
    else:  # fast division; 16-bit results may round to the other neighbour
        rtol = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}[result.dtype]
        torch.testing.assert_close(result, expected, rtol=rtol, atol=1e-7)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_triton_equals_the_reference(device, monkeypatch, dtype, dim, exact):
    poison_new_tensors(monkeypatch)
    for shape, seed in itertools.product(SHAPES, (5, 2**40 + 3)):
        g = heavy_tailed(shape, device, dtype)
        arguments = {"seed": seed, "dim": dim, "exact": exact, "offsets": (8, 12)}
        expected = mvue24(g, **arguments, backend="reference")
        assert expected.shape == g.shape and expected.dtype == dtype
        assert not expected.isnan().any()
        assert_equal_enough(mvue24(g, **arguments, backend="triton"), expected, exact)


def uniforms(seed, rows, columns):
    """One uniform number a group of (rows, columns) groups along columns, by plain integers."""
    out = torch.empty(rows, columns, dtype=torch.float64)
    for i, j in itertools.product(range(rows), range(columns)):
        x0, x1, key = j ^ (seed >> 32), i, seed & 0xFFFFFFFF
        for _ in range(7):
            product = 0xD256D193 * x0
            x0, x1 = (product >> 32) ^ key ^ x1, product % 2**32
            key = (key + 0x9E3779B9) % 2**32
        out[i, j] = (x0 >> 8) / 2**24
    return out


@pytest.mark.parametrize("backend", BACKENDS)
def test_exact_sampler_is_systematic_sampling(device, backend):
    """Against the textbook sampler in float64: p, cumulative sum, u and u + 1, largest last."""
    g = heavy_tailed((16, 64), "cpu", seed=3)
    seed = 2**35 + 11
    result = mvue24(g.to(device), seed=seed, backend=backend).cpu()
    u = uniforms(seed, 16, 16)
    for row, group in itertools.product(range(16), range(16)):
        x = g[row, 4 * group : 4 * group + 4].double()
        a = x.abs()
        # The smaller of each pair, then the smaller of the two winners, then the largest.
        winners = [0 if a[0] >= a[1] else 1, 2 if a[2] >= a[3] else 3]
        winners.sort(key=lambda i: float(a[i]))
        order = [i for i in range(4) if i not in winners] + winners
        r = float(a.sum() - a.max())
        expected = torch.zeros(4, dtype=torch.float64)
        if r == 0:
            expected = x
        else:
            step = (r + min(float(a.max()), r)) / 2
            b = [min(float(a[i]), r) / step for i in order]  # inclusion probabilities
            edges = [0.0, *itertools.accumulate(b)]
            for draw in (float(u[row, group]), float(u[row, group]) + 1):
                k = next(k for k in range(4) if draw < edges[k + 1] or k == 3)
                expected[order[k]] = x[order[k]] / b[k]
        torch.testing.assert_close(
            result[row, 4 * group : 4 * group + 4].double(), expected, rtol=1e-6, atol=0
        )


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("dim", [0, 1])
def test_unbiased(exact, dim):
    # Probabilities that 4000 draws can see: magnitudes 0.5 to 2, one in eight times ten (dominant).
    generator = torch.Generator().manual_seed(1)
    g = torch.empty(32, 32).uniform_(0.5, 2.0, generator=generator)
    g[torch.rand(32, 32, generator=generator) < 0.125] *= 10
    g[torch.rand(32, 32, generator=generator) < 0.5] *= -1
    draws = 4000
    stacked = g.repeat(draws, 1) if dim == 1 else g.repeat(1, draws)
    out = mvue24(stacked, seed=17, dim=dim, exact=exact).double()
    out = out.view(draws, 32, 32) if dim == 1 else out.view(32, draws, 32).transpose(0, 1)
    standard_error = out.std(0) / math.sqrt(draws)
    error = (out.mean(0) - g).abs()
    assert (error <= 5 * standard_error + 1e-6 * g.abs()).all()
    assert 0.8 < float((error / standard_error)[standard_error > 0].square().mean()) < 1.2


@pytest.mark.parametrize("exact", [True, False])
def test_unbiased_for_heavy_tails(exact):
    g = heavy_tailed((1, 4096), "cpu", seed=1)
    draws = 1000
    out = mvue24(g.repeat(draws, 1), seed=18, exact=exact).double()
    total = out.sum(1) - g.double().sum()
    assert abs(total.mean()) <= 5 * total.std() / math.sqrt(draws)


@pytest.mark.parametrize("exact", [True, False])
def test_unbiased_over_seeds(exact):
    """The same place in the tensor, many seeds: consecutive and derived ones."""
    g = torch.tensor([[0.1, -1.0, 2.0, 0.7] * 64])
    out = torch.cat([mvue24(g, seed=s, exact=exact) for s in range(500)]).double().view(-1, 4)
    standard_error = out.std(0) / math.sqrt(len(out))
    assert ((out.mean(0) - g[0, :4]).abs() <= 5 * standard_error).all()


@pytest.mark.parametrize("exact, variance", [(True, 0.476), (False, 0.505)])
def test_variance_for_normal_input(exact, variance):
    g = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(2))
    out = mvue24(g, seed=5, exact=exact)
    relative = float((out - g).double().square().sum() / g.double().square().sum())
    assert abs(relative - variance) < 0.01


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("exact", [True, False])
def test_every_kind_of_group(device, exact, backend):
    """All groups of some extreme values: structure, exceptions, infinities, NaN, subnormals."""
    inf, nan = float("inf"), float("nan")
    values = [0.0, -0.0, 1.0, -1.0, 3.0, 1e-45, -3e-45, 1e-38, 1e-30, 3.4e38, -inf, nan]
    g = torch.tensor(list(itertools.product(values, repeat=4)))
    wide = g.view(144, -1).to(device)
    a = g.abs().double()
    finite = g.isfinite().all(1) & (a.sum(1) < 3.4e38)
    one_hot = (g != 0).sum(1) == 1
    dominated = (a.sum(1) < 2 * a.amax(1)) & finite
    for seed in range(4):
        out = mvue24(wide, seed=seed, exact=exact, backend=backend).cpu().view(-1, 4)
        assert ((out != 0).sum(1) <= 2).all()
        assert out[finite].isfinite().all()
        assert (~out[~g.isfinite().all(1)].isfinite()).any(1).all()
        assert (out[finite][g[finite] == 0] == 0).all()
        assert torch.equal(out[one_hot & finite], g[one_hot & finite])
        assert (out * g.sign() >= 0)[finite].all()
        if exact:
            largest = a[dominated].argmax(1, keepdim=True)
            assert torch.equal(out[dominated].gather(1, largest), g[dominated].gather(1, largest))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("dim", [0, 1])
def test_a_shard_is_a_part_of_the_whole(device, dim, exact, backend):
    g = heavy_tailed((48, 56), device)
    arguments = {"seed": 99, "dim": dim, "exact": exact, "backend": backend}
    whole = mvue24(g, **arguments)
    cuts = [(0, 48, 0, 56), (16, 48, 0, 56), (0, 48, 28, 56), (20, 36, 12, 32)]
    for top, bottom, left, right in cuts:
        shard = g[top:bottom, left:right]
        assert torch.equal(
            mvue24(shard, **arguments, offsets=(top, left)), whole[top:bottom, left:right]
        )
    # The other dimension may be cut anywhere.
    odd = mvue24(
        g[:, 3:] if dim == 0 else g[3:], **arguments, offsets=(0, 3) if dim == 0 else (3, 0)
    )
    assert torch.equal(odd, whole[:, 3:] if dim == 0 else whole[3:])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dim", [0, 1])
def test_groups_in_any_order_draw_the_numbers_of_their_place(device, dim, backend):
    g = heavy_tailed((48, 56), device)
    arguments = {"seed": 99, "dim": dim, "backend": backend}
    order = torch.tensor([3, 11, 0, 7], device=device)
    places = (4 * order[:, None] + torch.arange(4, device=device)).flatten()[:-1]  # with a tail
    taken = g.index_select(dim, places)
    last = 4 * order[-1] + 3  # what the tail leaves out counts as zero
    g.select(dim, int(last)).zero_()
    expected = mvue24(g, **arguments).index_select(dim, places)
    assert torch.equal(mvue24(taken, **arguments, groups=order), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dim", [0, 1])
def test_tails_count_as_padded_with_zeros(device, dim, backend):
    for size in (1, 2, 3, 5, 131):
        g = heavy_tailed((size, 6) if dim == 0 else (6, size), device)
        missing = -size % 4
        shape = (missing, 6) if dim == 0 else (6, missing)
        padded = torch.cat([g, g.new_zeros(shape)], dim)
        expected = mvue24(padded, seed=4, dim=dim, backend=backend).narrow(dim, 0, size)
        assert torch.equal(mvue24(g, seed=4, dim=dim, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dim", [0, 1])
def test_layouts(device, dim, backend):
    """Column-major, sliced and strided inputs draw the same; dense layouts are kept."""
    g = heavy_tailed((40, 36), device)
    arguments = {"seed": 8, "dim": dim, "backend": backend}
    expected = mvue24(g, **arguments)
    column_major = mvue24(g.t().contiguous().t(), **arguments)
    assert torch.equal(column_major, expected) and column_major.stride() == (1, 40)
    turned = mvue24(g.t(), seed=8, dim=1 - dim, backend=backend)
    assert torch.equal(turned.t(), expected)
    wide = torch.cat([g, g], 1)[:, :36]
    strided = g.repeat_interleave(2, 1)[:, ::2]
    for view in (wide, strided):
        assert not view.is_contiguous()
        assert torch.equal(mvue24(view, **arguments), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_seeds_as_int_and_as_tensor(device, backend):
    g = heavy_tailed((16, 64), device)
    for seed in (0, 1, 2**31, 2**40 + 3, 2**63 - 1, -7):
        tensor = torch.tensor([seed], device=device)
        expected = mvue24(g, seed=seed, backend=backend)
        assert torch.equal(mvue24(g, seed=tensor, backend=backend), expected)
        assert not torch.equal(mvue24(g, seed=seed ^ 1, backend=backend), expected)
        assert not torch.equal(mvue24(g, seed=seed ^ (1 << 40), backend=backend), expected)
    high = mvue24(g, seed=2**64 - 7, backend=backend)
    assert torch.equal(high, mvue24(g, seed=-7, backend=backend))


def test_empty_and_default_dim(device):
    assert mvue24(torch.empty(0, 8, device=device), seed=1).shape == (0, 8)
    g = heavy_tailed((8, 8), device)
    assert torch.equal(mvue24(g, seed=1), mvue24(g, seed=1, dim=1))
    assert torch.equal(mvue24(g, seed=1, dim=-2), mvue24(g, seed=1, dim=0))
    assert not mvue24(g.requires_grad_(), seed=1).requires_grad


@pytest.mark.parametrize(
    "change, match",
    [
        ({"g": torch.ones(4)}, "2 dimensions"),
        ({"g": torch.ones(4, 4, dtype=torch.float64)}, "float64"),
        ({"dim": 2}, "dim=2"),
        ({"dim": 1, "offsets": (0, 2)}, "multiple of 4"),
        ({"dim": 0, "offsets": (2, 0)}, "multiple of 4"),
        ({"offsets": (-4, 0)}, "at least 0"),
        ({"offsets": (2**32, 0)}, "below"),
        ({"groups": torch.zeros(2, dtype=torch.int64)}, r"expected int64 \(1,\)"),
        ({"groups": torch.zeros(1)}, "groups are torch.float32"),
        ({"groups": torch.zeros(1, dtype=torch.int64), "offsets": (0, 4)}, "with groups"),
        ({"seed": 1.0}, "seed"),
        ({"backend": "cuda"}, "backend"),
    ],
)
def test_refusals(change, match):
    arguments = {"g": torch.ones(4, 4), "seed": 1} | change
    with pytest.raises(KernelError, match=match):
        mvue24(arguments.pop("g"), **arguments)
