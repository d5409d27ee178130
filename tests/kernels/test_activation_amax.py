"""Largest magnitudes of activations that nobody writes, and what products still lack."""

from __future__ import annotations

import pytest
import torch

from megasparse.errors import KernelError
from megasparse.kernels import (
    activated,
    activation_amax,
    activation_backward,
    activation_float8,
    activation_grad_amax,
    activation_grad_pack24,
)
from tests.kernels.gated_cases import BF16, FP16, SHAPES, bits, numbers, projection, scalar
from tests.kernels.poison import poison_new_tensors

BACKENDS = ["reference", "triton"]


def factors_of(power, device):
    """2^power, one that the value has been given already beside it."""
    a, b = scalar(2.0 ** (power - 3), device), scalar(2.0**5, device)
    return a, b, 4.0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(("tokens", "width", "dtype", "activation"), SHAPES)
def test_it_is_that_of_the_rounded_result(
    device, monkeypatch, tokens, width, dtype, activation, exact, backend
):
    fused = projection(tokens, width, device, dtype, exact, activation)
    dy = numbers(tokens, width, device, dtype, 1)
    y = activated(fused, activation, backend="reference")
    dz = activation_backward(dy, fused, activation, backend="reference")
    wide = torch.cat([fused, fused], 1)[:, : fused.shape[1]]
    with monkeypatch.context() as patch:
        poison_new_tensors(patch)
        found = (
            activation_amax(wide, activation, backend=backend),
            activation_grad_amax(dy, wide, activation, backend=backend),
        )
    for one, whole in zip(found, (y, dz), strict=True):
        # A sigmoid's last bit may decide how a number is rounded.
        tolerance = 0 if exact else 2**-8
        torch.testing.assert_close(one, whole.float().abs().max().view(1), rtol=tolerance, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_the_largest_is_found_anywhere(device, activation, backend):
    """At the edges of tiles and of the tensor, in either half."""
    width, halves = 1040, 1 + (activation == "swiglu")
    for tokens, row, column in ((9, 8, 1039), (65, 64, 0), (65, 3, 1024)):
        fused = torch.ones(tokens, halves * width, device=device, dtype=BF16)
        dy = torch.ones(tokens, width, device=device, dtype=BF16)
        fused[row, (halves - 1) * width + column] = -64.0 if halves == 2 else 64.0
        dy[row, column] = -100.0
        for found, whole in (
            (
                activation_amax(fused, activation, backend=backend),
                activated(fused, activation, backend="reference"),
            ),
            (
                activation_grad_amax(dy, fused, activation, backend=backend),
                activation_backward(dy, fused, activation, backend="reference"),
            ),
        ):
            largest = whole.float().abs()
            torch.testing.assert_close(found, largest.max().view(1), rtol=2**-8, atol=0)
            assert int(largest.argmax()) // largest.shape[1] == row


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_is_the_largest(device, backend):
    fused, dy = (torch.ones(130, n, device=device, dtype=BF16) for n in (128, 64))
    assert activation_amax(fused * float("inf"), backend=backend) == float("inf")
    fused[129, 127] = float("nan")
    assert activation_amax(fused, backend=backend).isnan()
    assert activation_grad_amax(dy, fused, backend=backend).isnan()
    assert activation_amax(torch.zeros_like(fused), backend=backend) == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ["swiglu", "geglu", "gelu"])
def test_what_products_lack_is_given_to_them(device, activation, backend):
    """Every kernel that reads them gives the bits of the same operation on corrected products."""
    fused = projection(131, 64, device, BF16, False, activation)
    dy = numbers(131, 64, device, BF16, 1)
    how = {"backend": backend}
    lacks = {"factors": factors_of(7, device)}
    both = {**lacks, "dy_factors": factors_of(-9, device)}
    less, less_dy = fused * 2.0**-7, dy * 2.0**9
    one = scalar(1.0, device)
    operands = {"seed": 3, "row_scale": one, "packed_scale": one, "activation": activation}
    pairs = [
        (
            activation_amax(fused, activation, **how),
            activation_amax(less, activation, **lacks, **how),
        ),
        (
            activation_grad_amax(dy, fused, activation, **how),
            activation_grad_amax(less_dy, less, activation, **both, **how),
        ),
        (
            activation_backward(dy, fused, activation, **how),
            activation_backward(less_dy, less, activation, **both, **how),
        ),
        (
            activation_float8(fused, scale=one, activation=activation, **how)[0],
            activation_float8(less, scale=one, activation=activation, **lacks, **how)[0],
        ),
    ]
    rows, packed = activation_grad_pack24(dy, fused, **operands, **how)
    again, repacked = activation_grad_pack24(less_dy, less, **operands, **both, **how)
    pairs += [(rows, again), (packed.buffer, repacked.buffer)]
    for expected, found in pairs:
        assert torch.equal(bits(found), bits(expected)) and bits(found).any()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("activation", ["swiglu", "geglu", "gelu"])
def test_on_a_gpu_it_is_the_two_kernels_to_the_last_bit(device, activation, dtype):
    tokens, width = 4096, 14336
    generator = torch.Generator(device).manual_seed(0)
    fused, dy = (
        torch.randn(tokens, n * width, generator=generator, device=device).to(dtype)
        for n in (1 if activation == "gelu" else 2, 1)
    )
    y, dz = activated(fused, activation), activation_backward(dy, fused, activation)
    assert float(activation_amax(fused, activation)) == float(y.float().abs().max())
    assert float(activation_grad_amax(dy, fused, activation)) == float(dz.float().abs().max())
    if dtype == FP16:  # it has no room for other powers
        return
    lacks = {"factors": factors_of(7, device)}
    both = {**lacks, "dy_factors": factors_of(-9, device)}
    less, less_dy, one = fused * 2.0**-7, dy * 2.0**9, scalar(1.0, device)
    assert torch.equal(activation_backward(less_dy, less, activation, **both), dz)
    assert float(activation_amax(less, activation, **lacks)) == float(y.float().abs().max())
    found = float(activation_grad_amax(less_dy, less, activation, **both))
    assert found == float(dz.float().abs().max())
    operands = {"seed": 3, "row_scale": one, "packed_scale": one, "activation": activation}
    pairs = zip(
        (
            *activation_float8(less, scale=one, activation=activation, **lacks),
            *activation_grad_pack24(less_dy, less, **operands, **both),
        ),
        (
            *activation_float8(fused, scale=one, activation=activation),
            *activation_grad_pack24(dy, fused, **operands),
        ),
        strict=True,
    )
    for again, expected in pairs:
        again, expected = (getattr(t, "buffer", t) for t in (again, expected))
        assert torch.equal(bits(again), bits(expected))


def test_refusals():
    fused, dy = torch.zeros(4, 256).half(), torch.zeros(4, 128).half()
    for wrong in (fused.float(), fused[:, :191], fused[:0], fused[0]):
        with pytest.raises(KernelError, match="activation_amax: fused is"):
            activation_amax(wrong)
    with pytest.raises(KernelError, match="activation_grad_amax: dy is"):
        activation_grad_amax(dy[:3], fused)
    one = torch.ones(())
    with pytest.raises(KernelError, match="activation_amax: applied is 3, expected a power of two"):
        activation_amax(fused, factors=(one, one, 3))
    with pytest.raises(KernelError, match="activation_float8: a is"):
        activation_float8(fused, scale=one, factors=(one.double(), one, 1.0))
