"""An activation fused with the quantizer of an 8-bit GEMM's operand: the two steps in one."""

from __future__ import annotations

import pytest
import torch

from megasparse.errors import KernelError
from megasparse.kernels import activated, activation_float8
from megasparse.kernels.float8 import blocks_of
from megasparse.kernels.weighted_activation import weighted_activation
from tests.kernels.gated_cases import (
    BF16,
    E4M3,
    FP16,
    SHAPES,
    bits,
    padded,
    projection,
    same,
    scalar,
)
from tests.kernels.poison import poison_new_tensors

BACKENDS = ["reference", "triton"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(("tokens", "width", "dtype", "activation"), SHAPES)
def test_forward_is_the_two_steps(
    device, monkeypatch, tokens, width, dtype, activation, exact, backend
):
    fused = projection(tokens, width, device, dtype, exact, activation)
    y = activated(fused, activation, backend="reference").float()
    how = {"activation": activation, "backend": backend}
    scale = scalar(600.0 / float(y.abs().max()), device)  # the largest saturate
    expected = padded((y * scale).clamp(-448, 448), tokens).to(E4M3)
    amax = scalar(0.0, device).view(1)
    with monkeypatch.context() as patch:
        poison_new_tensors(patch)
        rows, columns = activation_float8(fused, scale=scale, amax=amax, **how)
    same(rows, expected, exact)
    assert columns.is_contiguous() and torch.equal(bits(columns), bits(rows.t()))
    assert not bits(rows[tokens:]).any()
    torch.testing.assert_close(amax, y.abs().max().view(1), rtol=0 if exact else 1e-2, atol=0)
    # Half of a wider tensor, without the transposed copy, and a larger maximum that stays.
    wide = torch.cat([fused, fused], 1)[:, : fused.shape[1]]
    amax.fill_(1e9)
    again, none = activation_float8(wide, scale=scale, transposed=False, amax=amax, **how)
    assert none is None and torch.equal(bits(again), bits(rows)) and float(amax) == 1e9


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("counts", "activation"), [([256, 0, 128], "swiglu"), ([128], "gelu")])
def test_of_experts_it_is_weighted_and_transposed_for_each(
    device, monkeypatch, counts, activation, backend
):
    tokens, width = sum(counts), 192
    fused = projection(tokens, width, device, BF16, True, activation)
    weights = torch.rand(tokens, device=device)
    y = weighted_activation(fused, weights, activation, backend="reference").float()
    scale, amax = scalar(400.0 / float(y.abs().max()), device), scalar(0.0, device).view(1)
    how = {"scale": scale, "activation": activation, "weights": weights, "backend": backend}
    with monkeypatch.context() as patch:
        poison_new_tensors(patch)
        rows, blocks = activation_float8(fused, amax=amax, counts=counts, **how)
    same(rows, (y * scale).to(E4M3), True)
    assert amax == y.abs().max()
    for block, part in zip(blocks_of(blocks, counts), bits(rows).split(counts), strict=True):
        assert torch.equal(bits(block), part.t())
    whole, columns = activation_float8(fused, **how)
    assert torch.equal(bits(whole), bits(rows)) and torch.equal(bits(columns), bits(rows).t())
    again, none = activation_float8(fused, counts=counts, transposed=False, **how)
    assert none is None and torch.equal(bits(again), bits(rows))


@pytest.mark.gpu
def test_of_experts_on_a_gpu_at_the_size_of_a_layer(device):
    counts, width = [4096, 0, 8192 + 128, 640], 4096
    fused = projection(sum(counts), width, device, BF16, False, "swiglu")
    weights = torch.rand(sum(counts), device=device)
    y = weighted_activation(fused, weights).float()
    rows, blocks = activation_float8(
        fused, scale=scalar(3.0, device), weights=weights, counts=counts
    )
    expected = bits((y * 3.0).clamp(-448, 448).to(E4M3))
    assert torch.equal(bits(rows), expected)
    for block, part in zip(blocks_of(blocks, counts), expected.split(counts), strict=True):
        assert torch.equal(bits(block), part.t())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("activation", ["swiglu", "geglu", "gelu"])
def test_on_a_gpu_it_is_the_two_kernels_to_the_last_bit(device, activation, dtype):
    tokens, width = 5000, 1088
    fused = projection(tokens, width, device, dtype, False, activation)
    scale = scalar(3.0, device)
    y = activated(fused, activation).float()
    rows, columns = activation_float8(fused, scale=scale, activation=activation)
    expected = padded((y * scale).clamp(-448, 448), tokens).to(E4M3)
    assert torch.equal(bits(rows), bits(expected)) and torch.equal(bits(columns), bits(rows.t()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_is_not_hidden(device, backend):
    fused = torch.zeros(128, 128, device=device, dtype=BF16)
    fused[5, 7], fused[:, 64:] = float("nan"), 1.0
    one, amax = scalar(1.0, device), torch.zeros(1, device=device)
    rows, columns = activation_float8(fused, scale=one, amax=amax, backend=backend)
    assert rows.float()[5, 7].isnan() and columns.float()[7, 5].isnan()
    assert int(rows.float().isnan().sum()) == 1 and amax.isnan()


def test_refusals():
    one, fused = torch.ones(()), torch.zeros(4, 256).half()
    for wrong in (fused.float(), fused[:, :192], fused[:0], fused[0]):
        with pytest.raises(KernelError, match="activation_float8: fused is"):
            activation_float8(wrong, scale=one)
    with pytest.raises(KernelError, match=r"activation_float8: fused is .*, \(T, F\)"):
        activation_float8(fused[:, :96], scale=one, activation="gelu")
    with pytest.raises(KernelError, match="activation_float8: scale is"):
        activation_float8(fused, scale=torch.ones(1))
    with pytest.raises(KernelError, match="activation_float8: amax is"):
        activation_float8(fused, scale=one, amax=one)
    with pytest.raises(KernelError, match="weights is a"):
        activation_float8(fused, scale=one, weights=torch.ones(3))
    with pytest.raises(KernelError, match="in multiples of 128"):
        activation_float8(fused, scale=one, counts=[4])
    with pytest.raises(KernelError, match="groups are strided"):
        activation_float8(torch.zeros(128, 256).half(), scale=one, counts=[128], strided=True)
