"""Rotated queries, keys and values: against complex float64, gradients too."""

from __future__ import annotations

import pytest
import torch

from megasparse.errors import KernelError
from megasparse.kernels import Heads, rotary_qkv, split_qkv
from tests.kernels.poison import poison_new_tensors

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
# Length, sequences, heads: grouped, one group, a key for each query, odd halves, more than a tile.
SHAPES = [
    (5, 3, Heads(2, 4, 8)),
    (7, 1, Heads(1, 3, 4)),
    (4, 2, Heads(6, 1, 16)),
    (3, 2, Heads(3, 2, 6)),
    (2, 1, Heads(5, 8, 4)),
]


def angles_of(positions, channels):
    """Of positions 0, 1, ...: those of base 10000."""
    rates = 10000.0 ** (-torch.arange(0, channels, 2, dtype=torch.float64) / channels)
    half = torch.arange(positions, dtype=torch.float64)[:, None] * rates
    return torch.cat([half, half], 1).float()[:, None, None, :]


def by_definition(fused, angles, heads):
    """float64 by products of complex numbers."""
    groups, queries, channels = heads
    length, batch, _ = fused.shape
    parts = fused.double().view(length, batch, groups, queries + 2, channels)
    turns = torch.exp(1j * angles[:length, 0, 0, : channels // 2].double())[:, None, None, None]

    def turned(x):
        z = torch.complex(x[..., : channels // 2], x[..., channels // 2 :]) * turns
        return torch.cat([z.real, z.imag], -1)

    q = turned(parts[..., :queries, :]).reshape(length, batch, -1, channels)
    return q, turned(parts[..., queries, None, :])[..., 0, :], parts[..., queries + 1, :]


REAL = pytest.param("triton", (4096, 1, Heads(8, 4, 128)), marks=pytest.mark.gpu)


@pytest.mark.parametrize(
    ("backend", "shape"), [("reference", SHAPES[0]), ("triton", SHAPES[0]), REAL]
)
def test_what_a_product_lacks_is_given_to_it(device, backend, shape):
    """The bits of the corrected product's, values too; gradients are the corrected product's."""
    length, batch, heads = shape
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(length, batch, heads.width, generator=generator).bfloat16().to(device)
    angles = angles_of(length, heads.channels).to(device)
    lacks = (torch.tensor(2.0**5, device=device), torch.tensor(2.0**-10, device=device), 0.5)
    results = []
    for fused, factors in ((whole, None), (whole * 16, lacks)):
        fused.requires_grad_()
        parts = rotary_qkv(fused, angles, heads, factors=factors, backend=backend)
        torch.autograd.backward(parts, [t.detach() for t in parts])
        results.append([*parts, fused.grad])
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected) and expected.any()
    with pytest.raises(KernelError, match="rotary_qkv: applied is 3"):
        rotary_qkv(whole, angles, heads, factors=(*lacks[:2], 3.0))


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(device, monkeypatch, backend, shape):
    length, batch, heads = shape
    generator = torch.Generator().manual_seed(length)
    wide = torch.randn(length, batch, heads.width, generator=generator)
    angles = angles_of(length + 2, heads.channels).to(device)  # more positions than there are
    for dtype, tolerance in TOLERANCE.items():
        fused = wide.to(device, dtype, copy=True).requires_grad_()
        exact = fused.detach().double().requires_grad_()
        expected = by_definition(exact, angles, heads)
        with monkeypatch.context() as patch:
            poison_new_tensors(patch)
            found = rotary_qkv(fused, angles, heads, backend=backend)
            gradients = [torch.randn(t.shape, generator=generator).to(t) for t in expected]
            torch.autograd.backward(found, [g.to(dtype) for g in gradients])
        torch.autograd.backward(expected, [g.to(dtype).double() for g in gradients])
        for ours, right in zip((*found, fused.grad), (*expected, exact.grad), strict=True):
            assert ours.dtype == dtype and ours.is_contiguous()
            torch.testing.assert_close(ours.double(), right, rtol=tolerance, atol=tolerance)
        assert torch.equal(found[2], by_definition(fused, angles, heads)[2].to(dtype))


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_rotation_keeps_lengths_and_relative_positions(device, backend):
    """Scores of a query and a key depend on how far apart they are."""
    heads = Heads(1, 1, 8)
    row = torch.randn(heads.width, generator=torch.Generator().manual_seed(1))
    fused = row.expand(9, 1, -1).contiguous().to(device)
    q, k, v = rotary_qkv(fused, angles_of(9, 8).to(device), heads, backend=backend)
    assert torch.equal(v, fused[:, :, None, -8:])
    torch.testing.assert_close(q.norm(dim=-1), q[:1].norm(dim=-1).expand(9, 1, 1))
    scores = q[:, 0, 0] @ k[:, 0, 0].t()
    for apart in range(-4, 5):
        line = scores.diagonal(apart)
        torch.testing.assert_close(line, line[:1].expand_as(line), rtol=1e-4, atol=1e-4)


def test_gradients_of_other_strides_and_parts_without_one(device):
    heads, angles = Heads(2, 2, 4), angles_of(3, 4).to(device)
    fused = torch.randn(3, 2, heads.width, device=device).requires_grad_()
    q, k, _ = rotary_qkv(fused, angles, heads)
    weight = torch.randn(2, 3, 4, 4, device=device)
    (q.transpose(0, 1) * weight).sum().backward()  # k and v have none
    again = fused.detach().clone().requires_grad_()
    (rotary_qkv(again, angles, heads)[0] * weight.transpose(0, 1)).sum().backward()
    assert torch.equal(fused.grad, again.grad)
    assert not fused.grad.view(3, 2, 2, 4, 4)[..., 2:, :].any() and k.requires_grad


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_split_is_a_rotation_by_nothing(device, backend, shape):
    length, batch, heads = shape
    generator = torch.Generator().manual_seed(length)
    fused = torch.randn(length, batch, heads.width, generator=generator).to(device)
    results = []
    for split in (True, False):
        own = fused.clone().requires_grad_()
        angles = torch.zeros(length, heads.channels, device=device)
        parts = (
            split_qkv(own, heads, backend=backend)
            if split
            else rotary_qkv(own, angles, heads, backend=backend)
        )
        weights = [torch.arange(p.numel(), device=device).view_as(p) + 1.0 for p in parts]
        sum((p * w).sum() for p, w in zip(parts, weights, strict=True)).backward()
        results.append((*parts, own.grad))
    for ours, right in zip(*results, strict=True):
        assert torch.equal(ours, right)
    if heads.queries == 1:  # nothing is copied
        assert results[0][0].untyped_storage().nbytes() == fused.untyped_storage().nbytes()


def test_refusals(device):
    heads, angles = Heads(2, 2, 4), angles_of(3, 4).to(device)
    fused = torch.zeros(3, 2, heads.width, device=device)
    for wrong, match in (
        ((fused[..., 1:], angles, heads), r"\(3, 2, 31\), expected .* \(S, B, 32\)"),
        ((fused.double(), angles, heads), "float64"),
        ((fused, angles[:2], heads), "at least 3 positions by 4 channels"),
        ((fused, angles.double(), heads), "float64"),
        ((fused, angles[..., :2], heads), r"\(3, 1, 1, 2\)"),
    ):
        with pytest.raises(KernelError, match=match):
            rotary_qkv(*wrong)
    with pytest.raises(KernelError, match="backend='cuda'"):
        rotary_qkv(fused, angles, heads, backend="cuda")
    with pytest.raises(KernelError, match="heads have 3 channels, expected an even number"):
        split_qkv(torch.zeros(2, 1, 9, device=device), Heads(1, 1, 3))


@pytest.mark.parametrize("groups", [1, 3])
def test_gradients_that_lie_together_are_the_projections_gradient(groups: int) -> None:
    """As attention writes them which reads q, k and v where they lie."""
    heads = Heads(groups, 1, 4)
    fused = torch.randn(5, 2, heads.width, requires_grad=True)
    buffer = torch.randn(7 + fused.numel())
    whole = buffer[7:].view(5, 2, groups, 3, 4)
    parts = split_qkv(fused, heads, backend="reference")
    gradients = [whole[..., place, :] for place in range(3)]
    (found,) = torch.autograd.grad(parts, fused, gradients, retain_graph=True)
    assert found.data_ptr() == whole.data_ptr() and torch.equal(found, whole.view_as(fused))
    (copied,) = torch.autograd.grad(parts, fused, [g.clone() for g in gradients], retain_graph=True)
    assert copied.data_ptr() != whole.data_ptr() and torch.equal(copied, found)
    swapped = [gradients[1], gradients[0], gradients[2]]
    (other,) = torch.autograd.grad(parts, fused, swapped)
    assert torch.equal(other.view_as(whole)[..., 0, :], whole[..., 1, :])
