"""An activation times a weight a row, and its gradients: what autograd makes of the two."""

from __future__ import annotations

import pytest
import torch

from megasparse.errors import KernelError
from megasparse.kernels import activated
from megasparse.kernels.weighted_activation import (
    weighted_activation,
    weighted_activation_backward,
)
from tests.kernels.gated_cases import BF16, FP16, projection
from tests.kernels.poison import poison_new_tensors

BACKENDS = ["reference", "triton"]
F32 = torch.float32
# The interpreter's sigmoid is within some ulp of torch's, which moves a rounding now and then.
TOLERANCE = {F32: (1e-5, 1e-6), BF16: (1e-2, 1e-3), FP16: (2e-3, 1e-3)}
CASES = [
    (5, 24, F32, F32, "swiglu"),
    (3, 1100, BF16, F32, "geglu"),  # more channels than a program takes at a time
    (70, 64, BF16, BF16, "gelu"),
    (1, 136, FP16, F32, "swiglu"),
    (0, 64, BF16, F32, "swiglu"),
]


def _close(found, expected):
    rtol, atol = TOLERANCE[found.dtype]
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rows", "width", "dtype", "weight_dtype", "activation"), CASES)
def test_it_is_what_autograd_makes_of_both_operations(
    device, monkeypatch, rows, width, dtype, weight_dtype, activation, backend
):
    fused = projection(rows, width, device, dtype, False, activation).requires_grad_()
    weights = torch.rand(rows, device=device).to(weight_dtype).requires_grad_()
    dy = torch.randn(rows, width, device=device).to(dtype)
    y = activated(fused, activation, backend="reference")
    expected = (y * weights.unsqueeze(-1)).to(y.dtype)
    expected.backward(dy)
    with monkeypatch.context() as patch:
        poison_new_tensors(patch)
        found = weighted_activation(fused, weights, activation, backend=backend)
        dfused, dweights = weighted_activation_backward(
            dy, fused, weights, activation, backend=backend
        )
    assert not found.requires_grad and dweights.dtype == weight_dtype
    if backend == "reference":
        assert torch.equal(found, expected) and torch.equal(dfused, fused.grad)
    _close(found, expected.detach())
    _close(dfused, fused.grad)
    exact = (dy.double() * y.detach().double()).sum(1)
    # A rounding of y that falls otherwise, in a sum of many that nearly cancel.
    atol = 1e-4 if dtype == F32 else 0.05
    torch.testing.assert_close(dweights.double(), exact, rtol=1e-2, atol=atol)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_weight_of_zero_stops_the_gradient_and_nan_is_not_hidden(device, backend):
    fused = torch.ones(2, 128, device=device, dtype=BF16)
    weights = torch.tensor([0.0, 1.0], device=device)
    dy = torch.ones(2, 64, device=device, dtype=BF16)
    dy[1, 3] = float("nan")
    dfused, dweights = weighted_activation_backward(dy, fused, weights, backend=backend)
    assert not dfused[0].any() and float(dweights[0]) == pytest.approx(64 * 0.7311, rel=1e-2)
    assert int(dfused.isnan().sum()) == 2 and dweights[1].isnan()


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ["swiglu", "geglu", "gelu"])
def test_on_a_gpu_it_is_the_kernels_one_after_the_other(device, activation):
    """To the last bit, but for the sums of weights' gradients."""
    rows, width = 3000, 4096
    fused = projection(rows, width, device, BF16, False, activation).requires_grad_()
    weights = torch.rand(rows, device=device, requires_grad=True)
    dy = torch.randn(rows, width, device=device).to(BF16)
    y = activated(fused, activation)
    expected = (y * weights.unsqueeze(-1)).to(BF16)
    expected.backward(dy)
    assert torch.equal(weighted_activation(fused, weights, activation), expected)
    dfused, dweights = weighted_activation_backward(dy, fused, weights, activation)
    assert torch.equal(dfused, fused.grad)
    torch.testing.assert_close(dweights, weights.grad, rtol=1e-4, atol=1e-3)


def test_refusals():
    fused, weights = torch.zeros(4, 8), torch.zeros(4)
    for wrong in (fused.int(), fused[:, :7], fused[0]):
        with pytest.raises(KernelError, match="weighted_activation: fused is"):
            weighted_activation(wrong, weights)
    with pytest.raises(KernelError, match="weights are torch.int64"):
        weighted_activation(fused, weights.long())
    with pytest.raises(KernelError, match="weights is a"):
        weighted_activation(fused, weights[:3])
    with pytest.raises(KernelError, match="dy is a"):
        weighted_activation_backward(fused, fused, weights)
