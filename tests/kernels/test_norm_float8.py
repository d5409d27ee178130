"""A norm fused with what an 8-bit GEMM wants of it: torch's norm and the quantizer in one."""

from __future__ import annotations

import pytest
import torch

from megasparse.errors import KernelError
from megasparse.kernels import norm_amax, norm_float8
from megasparse.kernels.float8 import quantize
from megasparse.kernels.norm_float8 import triton
from tests.kernels.poison import poison_new_tensors

BACKENDS = ["reference", "triton"]
E4M3, BF16, FP16 = torch.float8_e4m3fn, torch.bfloat16, torch.float16
EPS = 1e-5
KINDS = ["rms", "layer", "layer without bias"]
# The widths take 64, 128, 192 = 3 x 64 and 640 = 5 x 128 channels in one or several turns.
SHAPES = [(128, 64, BF16), (131, 192, BF16), (3, 640, FP16), (257, 128, FP16)]


def scalar(x, device):
    return torch.tensor(float(x), device=device)


def bits(t):
    return t.contiguous().view(torch.uint8)


def parameters(kind, width, device, dtype, generator):
    weight = 1 + torch.randn(width, generator=generator) / 4
    bias = torch.randn(width, generator=generator) if kind == "layer" else None
    return [None if t is None else t.to(dtype).to(device) for t in (weight, bias)]


def random_rows(tokens, width, device, dtype, generator):
    """Tokens of very different size, and off centre."""
    sizes = torch.randn(tokens, 1, generator=generator).mul(2).exp()
    x = torch.randn(tokens, width, generator=generator)
    x += torch.randn(tokens, 1, generator=generator)
    return (x * sizes).to(dtype).to(device)


def exact_rows(tokens, width, device, dtype, generator):
    """c +- 2^k, as many of each: every order of additions gives mean and variance exactly."""
    signs = torch.ones(tokens, width)
    signs[:, : width // 2] = -1
    order = torch.rand(tokens, width, generator=generator).argsort(1)
    sizes = 2.0 ** torch.randint(-2, 3, (tokens, 1), generator=generator)
    centre = torch.randint(-3, 4, (tokens, 1), generator=generator)
    return signs.gather(1, order).mul(sizes), centre


def in_float64(x, weight, bias, kind, eps):
    x = x.double()
    mean = x.mean(1) if kind != "rms" else torch.zeros_like(x[:, 0])
    rstd = ((x - mean[:, None]).square().mean(1) + eps).rsqrt()
    y = (x - mean[:, None]) * rstd[:, None] * weight.double()
    return y if bias is None else y + bias.double(), mean, rstd


def padded(t, tokens):
    return torch.nn.functional.pad(t.float(), (0, 0, 0, -tokens % 128))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("tokens", "width", "dtype"), SHAPES)
def test_against_float64(device, monkeypatch, tokens, width, dtype, kind, backend):
    generator = torch.Generator().manual_seed(tokens + width)
    x = random_rows(tokens, width, device, dtype, generator)
    weight, bias = parameters(kind, width, device, dtype, generator)
    y, mean, rstd = in_float64(x, weight, bias, kind, EPS)
    y = y.to(dtype).float()
    scale = scalar(600.0 / float(y.abs().max()), device)  # the largest saturate
    expected = quantize(padded(y, tokens), scale, E4M3)
    amax = scalar(0.0, device).view(1)
    arguments = {"centred": kind != "rms", "eps": EPS, "scale": scale, "backend": backend}
    with monkeypatch.context() as patch:
        poison_new_tensors(patch)
        found = norm_float8(x, weight, bias, amax=amax, **arguments)
        how = {key: arguments[key] for key in ("centred", "eps", "backend")}
        alone = norm_amax(x, weight, bias, **how)
    torch.testing.assert_close(alone, y.abs().max().view(1), rtol=1e-2, atol=0)
    assert found.rows.shape == expected.shape and found.rows.dtype == E4M3
    wrong = bits(found.rows) != bits(expected)
    assert float(wrong.float().mean()) <= 2e-3  # where a last bit of y decides
    torch.testing.assert_close(found.rows.float(), expected.float(), rtol=0.13, atol=2.0**-9)
    assert found.columns.is_contiguous()
    assert torch.equal(bits(found.columns), bits(found.rows.t()))
    assert not bits(found.rows[tokens:]).any()
    torch.testing.assert_close(amax, y.abs().max().view(1), rtol=1e-2, atol=0)
    torch.testing.assert_close(found.rstd, rstd.float(), rtol=1e-5, atol=0)
    if kind == "rms":
        assert found.mean is None
    else:
        torch.testing.assert_close(found.mean, mean.float(), rtol=1e-5, atol=1e-5)
    # Half of a wider tensor, without the transposed copy, and a larger maximum that stays.
    wide = torch.cat([x, x], 1)[:, :width]
    amax.fill_(1e9)
    again = norm_float8(wide, weight, bias, amax=amax, transposed=False, **arguments)
    assert again.columns is None and torch.equal(bits(again.rows), bits(found.rows))
    assert float(amax) == 1e9
    columnwise = norm_float8(x.t().contiguous().t(), weight, bias, **arguments)
    assert torch.equal(bits(columnwise.rows), bits(found.rows))


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # eps 0, after the last token
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("tokens", "width", "dtype"), SHAPES)
def test_the_same_bits_where_sums_are_exact(device, tokens, width, dtype, kind):
    generator = torch.Generator().manual_seed(tokens)
    x, centre = exact_rows(tokens, width, device, dtype, generator)
    x = (x if kind == "rms" else x + centre).to(dtype).to(device)
    weight, bias = parameters(kind, width, device, dtype, generator)
    results = []
    for backend in BACKENDS:
        amax = scalar(0.0, device).view(1)
        found = norm_float8(
            x,
            weight,
            bias,
            centred=kind != "rms",
            eps=0.0,
            scale=scalar(77.0, device),
            amax=amax,
            backend=backend,
        )
        results.append((found, amax))
    (expected, expected_amax), (found, amax) = results
    wrong = (bits(found.rows) != bits(expected.rows)).float().mean()
    # Every value of a channel is one of two: where a last bit of torch's own decides, half differ.
    assert float(wrong) <= (1 / width if kind == "layer" else 0.0)
    torch.testing.assert_close(found.rstd, expected.rstd, rtol=1e-6, atol=0)
    torch.testing.assert_close(amax, expected_amax, rtol=1e-2 if kind == "layer" else 0, atol=0)
    if kind != "rms":
        torch.testing.assert_close(found.mean, expected.mean, rtol=0, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu_the_magnitude_is_that_of_the_operands(device, kind):
    """To the last bit of a 16-bit number, as sums have another order."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4096, 4096, generator=generator).to(device, BF16)
    weight, bias = parameters(kind, 4096, device, BF16, generator)
    how = {"centred": kind != "rms", "eps": EPS}
    amax = scalar(0.0, device).view(1)
    norm_float8(x, weight, bias, scale=scalar(1.0, device), amax=amax, **how)
    torch.testing.assert_close(norm_amax(x, weight, bias, **how), amax, rtol=2**-7, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_zeros_and_large_values(device, kind, backend):
    """A token of zeros is the bias; of one that dwarfs the others only itself remains."""
    x = torch.randn(6, 128, generator=torch.Generator().manual_seed(0)).to(BF16).to(device)
    x[1] = 0.0
    x[2, 5] = 3e4
    x[3] = x[3] * 1e15  # its squares are still finite in float32
    x[4] = x[4] * 1e-15  # and here eps is all there is
    weight = torch.full((128,), 2.0, device=device, dtype=BF16)
    bias = torch.full_like(weight, 0.5) if kind == "layer" else None
    amax = scalar(0.0, device).view(1)
    found = norm_float8(
        x,
        weight,
        bias,
        centred=kind == "layer",
        eps=EPS,
        scale=scalar(8.0, device),
        amax=amax,
        backend=backend,
    )
    rows = found.rows.float()
    assert rows.isfinite().all() and float(amax) >= 2 * 127**0.5 * 0.98
    constant = 0.0 if bias is None else 4.0
    assert rows[1].tolist() == [constant] * 128 == rows[4].tolist()
    assert float(rows[2, 5]) > 170.0 and float(rows[2].abs().sort().values[-2]) < 8.0
    y = in_float64(x, weight, bias, kind, EPS)[0][3]
    torch.testing.assert_close(rows[3], (8 * y).float(), rtol=0.08, atol=0.02)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_is_not_hidden(device, backend):
    x = torch.ones(128, 64, device=device, dtype=BF16)
    x[5, 7] = float("nan")
    weight, amax = torch.ones(64, device=device, dtype=BF16), torch.zeros(1, device=device)
    found = norm_float8(
        x, weight, centred=False, eps=EPS, scale=scalar(1.0, device), amax=amax, backend=backend
    )
    assert found.rows.float()[5].isnan().all() and found.columns.float()[:, 5].isnan().all()
    assert int(found.rows.float().isnan().sum()) == 64 and amax.isnan().all()


def test_no_gradient_is_recorded(device):
    x = torch.randn(3, 64, device=device).to(BF16).requires_grad_()
    weight = torch.ones(64, device=device, dtype=BF16, requires_grad=True)
    found = norm_float8(x, weight, centred=True, eps=EPS, scale=scalar(1.0, device))
    assert not any(t.requires_grad for t in found)


def test_tiles_divide_what_there_is():
    for width, expected in ((4096, (8, 512)), (5120, (4, 1024)), (768, (32, 128)), (64, (32, 64))):
        groups, channels, _ = triton._tile(16384, width, triton.LAUNCH)
        assert (groups, channels) == expected and width % channels == 0
    assert triton._tile(16384, 1 << 20, triton.LAUNCH)[:2] == (1, 4096)


def test_refusals():
    one, x, weight = torch.ones(()), torch.zeros(4, 128).half(), torch.ones(128).half()
    arguments = {"centred": False, "eps": EPS}
    for wrong in (x.float(), x[:, :96], x[:0], x[0]):
        with pytest.raises(KernelError, match="norm_float8: x is"):
            norm_float8(wrong, weight, scale=one, **arguments)
    with pytest.raises(KernelError, match="norm_float8: weight is"):
        norm_float8(x, weight.float(), scale=one, **arguments)
    with pytest.raises(KernelError, match="norm_float8: bias is"):
        norm_float8(x, weight, weight[:64], scale=one, **arguments)
    with pytest.raises(KernelError, match="norm_float8: scale is"):
        norm_float8(x, weight, scale=torch.ones(1), **arguments)
    with pytest.raises(KernelError, match="norm_float8: amax is"):
        norm_float8(x, weight, scale=one, amax=one, **arguments)
