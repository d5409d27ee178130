"""MVUE in groups of tokens a quarter of all apart: an order of tokens, and nothing else."""

from __future__ import annotations

import pytest
import torch

from megasparse.errors import KernelError
from megasparse.kernels import (
    activation_backward,
    activation_float8,
    activation_grad_pack24,
    grad_pack24,
    is_24,
    mvue24,
    mvue24_variance,
    mvue_pack24,
    norm_float8,
    pack24,
    transpose_float8,
    unpack24,
)
from megasparse.kernels.token_order import by_groups
from tests.kernels.poison import poison_new_tensors

BACKENDS = ["reference", "triton"]
E4M3, E5M2, BF16, FP16 = torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float16


def order(tokens):
    """Tokens in the order of groups, written out."""
    quarter = tokens // 4
    return [q + i * quarter for q in range(quarter) for i in range(4)]


def as_before(x):
    return torch.empty_like(x).index_copy_(0, torch.tensor(order(len(x)), device=x.device), x)


def whole(tokens, multiple):
    return -(-tokens // multiple) * multiple


def gradient(tokens, width, device, dtype=FP16):
    """Integers: exact in every 16-bit format, so that no rounding of the interpreter matters."""
    generator = torch.Generator().manual_seed(tokens + width)
    return torch.randint(-64, 65, (tokens, width), generator=generator).to(device, dtype)


def padded(t, multiple):
    return torch.nn.functional.pad(t, (0, 0, 0, -t.shape[0] % multiple))


def drawn(dz, multiple, **arguments):
    """The draw of neighbours from reordered tokens: (T', N) in the order of groups."""
    filled = padded(dz, multiple)
    return mvue24(filled[order(len(filled))], dim=0, backend="reference", **arguments)


def scalar(x, device):
    return torch.tensor(float(x), device=device)


def bits(t):
    return t.contiguous().view(torch.uint8)


def test_the_order_of_tokens():
    x = torch.arange(24).view(8, 3)
    assert order(8) == [0, 2, 4, 6, 1, 3, 5, 7]
    assert torch.equal(by_groups(x), x[order(8)]) and torch.equal(as_before(by_groups(x)), x)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(64, 20), (4, 4), (130, 7), (3, 5), (1, 1)])
def test_mvue24_draws_what_neighbours_draw_of_reordered_tokens(device, shape, exact, backend):
    g = torch.randn(shape, generator=torch.Generator().manual_seed(1)).exp().to(device)
    expected = as_before(drawn(g, 4, seed=5, offsets=(0, 12), exact=exact))[: shape[0]]
    arguments = {"seed": 5, "exact": exact, "strided": True, "backend": backend}
    for view in (g, g.t().contiguous().t()):  # row- and column-major
        found = mvue24(view, dim=0, offsets=(0, 12), **arguments)
        assert found.stride() == view.stride() or 1 in shape
        assert torch.equal(found == 0, expected == 0)
        torch.testing.assert_close(found, expected, rtol=0 if exact else 1e-6, atol=0)
        across = mvue24(view.t(), dim=1, offsets=(12, 0), **arguments)
        assert torch.equal(across.t(), found)


def test_a_group_must_be_whole(device):
    with pytest.raises(KernelError, match="expected 0 along dim=0 where strided"):
        mvue24(torch.ones(8, 8, device=device), seed=1, dim=0, offsets=(8, 0), strided=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(("tokens", "width"), [(256, 128), (130, 64), (3, 64)])
def test_packing_in_16_bits(device, tokens, width, exact, backend, monkeypatch):
    dz = gradient(tokens, width, device)
    expected = drawn(dz, 64, seed=9, exact=exact).t()
    with monkeypatch.context() as patch:
        poison_new_tensors(patch)
        packed = mvue_pack24(dz, seed=9, exact=exact, strided=True, backend=backend)
    assert packed.shape == (width, whole(tokens, 64))
    found = unpack24(packed)
    torch.testing.assert_close(found, expected, rtol=0 if exact else 2**-10, atol=0)
    assert is_24(found)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("tokens", "width"), [(256, 128), (131, 64)])
def test_both_operands_of_a_gradient(device, tokens, width, backend, monkeypatch):
    dz = gradient(tokens, width, device)
    scale, sums = scalar(2.0, device), torch.zeros(width, device=device)
    arguments = {"seed": 4, "row_scale": scale, "packed_scale": scale, "backend": backend}
    arguments["channels"] = ((0, 64, width),)
    neighbours, _ = grad_pack24(dz, **arguments)
    with monkeypatch.context() as patch:
        poison_new_tensors(patch)
        rows, packed = grad_pack24(dz, strided=True, sums=sums, **arguments)
    assert torch.equal(bits(rows), bits(neighbours))  # rows stay in their order
    torch.testing.assert_close(sums.double(), dz.double().sum(0))
    expected = drawn(dz.float(), 128, seed=4, offsets=(0, 64)).t() * 2.0
    expected = pack24(expected.clamp(-448, 448).to(E4M3))
    assert torch.equal(packed.metadata, expected.metadata)
    assert torch.equal(bits(packed.values), bits(expected.values))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [256, 131])
def test_both_operands_of_a_gated_gradient(device, tokens, backend, monkeypatch):
    # Gates of 0, where the activation's gradients are exact: half of x, and 0.
    dy = gradient(tokens, 64, device)
    fused = torch.cat([torch.zeros_like(dy), gradient(tokens, 64, device) / 64], 1)
    dz = padded(activation_backward(dy, fused, "swiglu", backend="reference"), 128)
    scale = scalar(0.5, device)
    arguments = {"seed": 4, "row_scale": scale, "packed_scale": scale, "strided": True}
    rows, packed = grad_pack24(dz, backend="reference", **arguments)
    with monkeypatch.context() as patch:
        poison_new_tensors(patch)
        found, repacked = activation_grad_pack24(dy, fused, backend=backend, **arguments)
    assert torch.equal(bits(found), bits(rows))
    assert torch.equal(repacked.buffer, packed.buffer)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [256, 131, 3])
def test_the_other_operand_has_the_same_order(device, tokens, backend, monkeypatch):
    """Of a norm, of an activation, and of rows that were quantized and gathered before."""
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, 192, generator=generator).to(device, BF16)
    weight = torch.ones(192, device=device, dtype=BF16)
    fused = torch.randn(tokens, 128, generator=generator).to(device, BF16)
    one = scalar(8.0, device)
    norm = {"centred": True, "eps": 1e-5, "scale": one, "backend": backend}
    with monkeypatch.context() as patch:
        poison_new_tensors(patch)
        of_norm = norm_float8(x, weight, strided=True, **norm)
        of_gated = activation_float8(fused, scale=one, strided=True, backend=backend)
        again = transpose_float8(of_norm.rows, backend=backend)
    neighbours = norm_float8(x, weight, **norm)
    assert torch.equal(bits(of_norm.rows), bits(neighbours.rows))
    assert torch.equal(of_norm.mean, neighbours.mean)
    assert torch.equal(of_norm.rstd, neighbours.rstd)
    rows = activation_float8(fused, scale=one, backend=backend)[0]
    assert torch.equal(bits(of_gated[0]), bits(rows))
    for kept, columns in ((of_norm.rows, of_norm.columns), of_gated, (of_norm.rows, again)):
        assert columns.is_contiguous()
        assert torch.equal(bits(columns), bits(kept)[order(len(kept))].t())


def test_refusals_of_the_transposition(device):
    for rows in (torch.ones(128, 64), torch.ones(48, 64).to(E4M3), torch.ones(128, 32).to(E4M3)):
        with pytest.raises(KernelError, match="transpose_float8: rows are"):
            transpose_float8(rows.to(device))


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("strided", [True, False])
def test_the_variance_is_that_of_many_draws(exact, strided):
    g = torch.randn(32, 24, generator=torch.Generator().manual_seed(2)).mul(1.5).exp()
    g[3] = 0.0
    stacked, draws = g.repeat(1, 1500), 1500
    out = mvue24(stacked, seed=17, dim=0, exact=exact, strided=strided)
    squares = (out - stacked).double().square().view(32, draws, 24).sum((0, 2))
    variance = float(mvue24_variance(g, dim=0, exact=exact, strided=strided))
    assert abs(float(squares.mean()) - variance) < 5 * float(squares.std()) / draws**0.5
    assert variance == pytest.approx(
        float(mvue24_variance(g.t(), dim=1, exact=exact, strided=strided)), rel=1e-6
    )


def test_tokens_that_are_like_their_neighbours_vary_less_when_strided():
    """Sequences in which gradients grow from token to token: R3 in small."""
    size = torch.linspace(-2, 2, 256).exp()[:, None]
    g = torch.randn(256, 64, generator=torch.Generator().manual_seed(3)) * size
    neighbours, strided = (float(mvue24_variance(g, dim=0, strided=s)) for s in (False, True))
    assert strided < 0.9 * neighbours
    one_hot = torch.zeros(8, 4)
    one_hot[3] = 2.0
    assert float(mvue24_variance(one_hot, dim=0, strided=True)) == 0.0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_a_large_gradient_on_a_gpu(device, dtype):
    """Kernels equal their definitions to the last bit, at a size with several tiles and padding."""
    generator = torch.Generator().manual_seed(6)
    dz = (torch.randn(5000, 1088, generator=generator) * 1e-3).to(device, dtype)
    scale = scalar(1e5, device)
    results = [
        (
            mvue_pack24(dz, seed=2, strided=True, backend=backend),
            *grad_pack24(
                dz, seed=2, strided=True, row_scale=scale, packed_scale=scale, backend=backend
            ),
        )
        for backend in BACKENDS
    ]
    (packed16, rows, packed8), (found16, found_rows, found8) = results
    assert torch.equal(packed16.buffer, found16.buffer)
    assert torch.equal(packed8.buffer, found8.buffer) and torch.equal(bits(rows), bits(found_rows))
    e4m3 = padded(dz, 128)[:, :1024].mul(1e5).clamp(-448, 448).to(E4M3)
    assert torch.equal(bits(transpose_float8(e4m3)), bits(by_groups(bits(e4m3)).t()))
