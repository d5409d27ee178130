"""SwiGLU, GEGLU and GELU: values and gradients against float64 autograd, in every layout."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megasparse.errors import KernelError
from megasparse.kernels import (
    activated,
    activation_backward,
    geglu,
    geglu_fused,
    swiglu,
    swiglu_fused,
)
from megasparse.kernels.activation.layout import Plane, common_plane
from tests.kernels.poison import poison_new_tensors

BACKENDS = ["reference", "triton"]
OPS = {
    "swiglu": (swiglu, F.silu),
    "geglu": (geglu, lambda t: F.gelu(t, approximate="tanh")),
}
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
T, H = 33, 70


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * 3


def halves(z):
    return z[..., :H], z[..., H:]


LAYOUTS = {
    "row-major": lambda: (random(T, H), random(T, H).flip(0)),
    "column-major": lambda: (random(H, T).t(), random(H, T).flip(0).t()),
    "row-major halves": lambda: halves(random(T, 2 * H)),
    "column-major halves": lambda: halves(random(2 * H, T).t()),
    "3-D halves": lambda: halves(random(3, 11, 2 * H)),
    "3-D column-major halves": lambda: halves(random(2 * H, 3, 11).permute(1, 2, 0)),
    "one of each": lambda: (random(T, H), random(H, T).t()),
    "strided": lambda: (random(T, H, 2)[..., 0], random(T, H)),
    "long": lambda: (random(1, 70001), random(1, 70001).flip(1)),
    "one element": lambda: (random(1, 1), random(1)[None]),
}


def order_of(t):
    """Strides of a dense tensor in t's order."""
    return torch.empty_like(t).stride()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OPS)
def test_values_and_gradients(device, monkeypatch, op, layout, backend):
    function, activation = OPS[op]
    for dtype, tolerance in TOLERANCE.items():
        x, gate = (t.to(device, dtype) for t in LAYOUTS[layout]())
        if "halves" in layout:  # .to() makes dense copies: cut again
            x, gate = halves(torch.cat([x, gate], -1))
            if "column" in layout:
                z = torch.cat([x, gate], -1).movedim(-1, 0).contiguous().movedim(0, -1)
                x, gate = halves(z)
        wide = [t.double().requires_grad_() for t in (x, gate)]
        expected = activation(wide[1]) * wide[0]
        dy = random(*x.shape).to(device, dtype)
        expected.backward(dy.double())
        with monkeypatch.context() as patch:
            poison_new_tensors(patch)
            inputs = [t.detach().requires_grad_() for t in (x, gate)]
            out = function(*inputs, backend=backend)
            out.backward(dy)
        results = (out, inputs[0].grad, inputs[1].grad)
        for result, target in zip(results, (expected, wide[0].grad, wide[1].grad)):
            assert result.dtype == dtype
            torch.testing.assert_close(result.double(), target, rtol=tolerance, atol=tolerance)
        assert out.stride() == order_of(x) and inputs[0].grad.stride() == order_of(x)
        assert inputs[1].grad.stride() == order_of(gate)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_gradients_of_other_layouts(device, op, backend):
    """An expanded or transposed dy, as a sum or a GEMM gives it."""
    function, activation = OPS[op]
    x, gate = (t.to(device) for t in LAYOUTS["row-major"]())
    for dy in (torch.ones((), device=device).expand(T, H), random(H, T).t().to(device)):
        a = [t.detach().requires_grad_() for t in (x, gate)]
        b = [t.detach().double().requires_grad_() for t in (x, gate)]
        function(*a, backend=backend).backward(dy)
        (activation(b[1]) * b[0]).backward(dy.double())
        for ours, theirs in zip(a, b):
            torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("op", OPS)
def test_gradcheck(op):
    inputs = [random(5, 6).double().requires_grad_(), random(6, 5).t().double().requires_grad_()]
    assert torch.autograd.gradcheck(OPS[op][0], inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_extreme_gates(device, op, backend):
    """Far gates are 0 and the identity, and NaN stays NaN."""
    gate = torch.tensor([[-1e4, 1e4, 0.0, float("nan")]], device=device)
    x = torch.full_like(gate, 2.0)
    out = OPS[op][0](x, gate, backend=backend).cpu()
    assert out[0, :3].tolist() == [0.0, 2e4, 0.0] and out[0, 3].isnan()


FUSED = {
    "row-major": lambda: random(T, 2 * H),
    "3-D": lambda: random(3, 11, 2 * H),
    "column-major": lambda: random(2 * H, T).t(),
    "3-D column-major": lambda: random(2 * H, 3, 11).permute(1, 2, 0),
    "swapped": lambda: random(11, 3, 2 * H).transpose(0, 1),
    "in the middle": lambda: random(3, 2 * H, 11).transpose(1, 2),
    "no dense tensor": lambda: random(T, 5 * H)[:, H : 3 * H],
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", FUSED)
@pytest.mark.parametrize("name", OPS)
def test_fused_is_the_activation_of_the_halves(device, monkeypatch, name, layout, backend):
    """Bit for bit, values and gradients, the latter in one tensor of the layout of the input."""
    fused = FUSED[layout]().to(device)
    with torch.no_grad():
        halved = fused.clone().requires_grad_()
    gate, x = halved[..., :H], halved[..., H:]
    expected = OPS[name][0](x, gate, backend=backend)
    of_fused = {"swiglu": swiglu_fused, "geglu": geglu_fused}[name]
    flat = random(*x.shape)
    turned = random(*x.shape[::-1]).permute(2, 1, 0) if x.dim() == 3 else random(H, T).t()
    for dy in (flat.to(device), turned.to(device)):
        halved.grad = None
        expected.backward(dy, retain_graph=True)
        with monkeypatch.context() as patch:
            poison_new_tensors(patch)
            leaf = fused.detach().requires_grad_()
            out = of_fused(leaf, backend=backend)
            assert len(out.grad_fn.saved_tensors) == 1
            (grad,) = torch.autograd.grad(out, leaf, dy)
            assert torch.equal(activation_backward(dy, fused, name, backend=backend), grad)
        assert torch.equal(out, expected) and out.stride() == expected.stride()
        assert torch.equal(grad, halved.grad) and grad.stride() == order_of(fused)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("turned", [False, True])
def test_gelu_has_no_second_half(device, dtype, turned, backend):
    flat = torch.cat([random(T, H - 4), torch.tensor([-40.0, -1e-3, 0.0, 40.0]).expand(T, 4)], 1)
    x = (flat.t() if turned else flat).to(device, dtype).requires_grad_()
    dy = random(*x.shape).to(device, dtype)
    y = activated(x, "gelu", backend=backend)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert y.stride() == x.stride() and dx.stride() == x.stride()
    assert torch.equal(activation_backward(dy, x.detach(), "gelu", backend=backend), dx)
    wide = x.detach().double().requires_grad_()
    expected = F.gelu(wide, approximate="tanh")
    (gradient,) = torch.autograd.grad(expected, wide, dy.double())
    for found, exact in ((y, expected), (dx, gradient)):
        bound = TOLERANCE[dtype]
        torch.testing.assert_close(found.double(), exact, rtol=bound, atol=bound)


def test_only_the_needed_is_kept():
    x, gate = (t.requires_grad_() for t in LAYOUTS["row-major"]())
    out = swiglu(x, gate)
    assert sum(t is not None for t in out.grad_fn.saved_tensors) == 2


def test_empty(device):
    x = torch.empty(0, 8, device=device, requires_grad=True)
    out = swiglu(x, x.detach())
    out.sum().backward()
    assert out.shape == (0, 8) and x.grad.shape == (0, 8)


def test_common_plane():
    x, z = torch.empty(6, 8), torch.empty(6, 16)
    assert common_plane(x, x) == Plane(1, 48, (48, 48))
    assert common_plane(z[:, :8], z[:, 8:], x) == Plane(6, 8, (16, 16, 8))
    assert common_plane(x.t(), x.t()) == Plane(1, 48, (48, 48))
    assert common_plane(x, torch.empty(8, 6).t()) is None
    assert common_plane(torch.empty(6, 8, 2)[..., 0], x) is None
    deep = torch.empty(2, 3, 16)
    assert common_plane(deep[..., :8], deep[..., 8:]) == Plane(6, 8, (16, 16))
    assert common_plane(torch.empty(4, 3, 16)[::2, :, :8], deep[..., :8]) is None


def test_refusals(device):
    x = torch.ones(4, 4, device=device)
    with pytest.raises(KernelError, match="expected the same"):
        swiglu(x, x[:2])
    with pytest.raises(KernelError, match="expected the same"):
        geglu(x, x.half())
    with pytest.raises(KernelError, match="int64"):
        swiglu(x.long(), x.long())
    with pytest.raises(KernelError, match="float64"):
        swiglu(x.double(), x.double(), backend="triton")
    with pytest.raises(KernelError, match="backend='cusparselt'"):
        swiglu(x, x, backend="cusparselt")
    with pytest.raises(KernelError, match="even last dimension"):
        swiglu_fused(x[:, :3])
    with pytest.raises(KernelError, match="dy is .* expected"):
        activation_backward(x, x, "swiglu")
