"""Rows in e4m3, each by its own magnitude: Triton against the definition, and what both promise."""

from __future__ import annotations

import pytest
import torch

from megasparse.errors import KernelError
from megasparse.kernels import quantize_rows, rescale_rows_
from tests.kernels.poison import poison_new_tensors

BACKENDS = ["reference", "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), [(1, 64), (5, 100), (32, 4096)])
def test_kernel_and_definition_agree(device, dtype, tokens, width, monkeypatch):
    poison_new_tensors(monkeypatch)
    generator = torch.Generator().manual_seed(tokens)
    wide = torch.randn(tokens, width + 8, generator=generator) * 4
    x = (wide * torch.logspace(-3, 3, tokens)[:, None]).to(device, dtype)[:, :width]
    expected = quantize_rows(x, backend="reference")
    for source in (x, x.t().contiguous().t()):
        found = quantize_rows(source, backend="triton")
        assert torch.equal(found.scale_inv, expected.scale_inv)
        assert torch.equal(found.rows.view(torch.uint8), expected.rows.view(torch.uint8))
    assert expected.rows.shape == (-(-tokens // 16) * 16, width)
    assert not expected.rows[tokens:].float().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_fills_the_format_and_is_itself_again(device, backend):
    """The scale is the largest power of two that keeps a row within 448; the cast rounds by 2^-4
    of a number, or by 2^-10 of what the format's smallest normal number stands for."""
    generator = torch.Generator().manual_seed(1)
    x = (torch.randn(24, 256, generator=generator) * torch.logspace(-30, 30, 24)[:, None]).to(
        device
    )
    rows, scale_inv = quantize_rows(x, backend=backend)
    amax = x.abs().amax(1)
    most = amax / scale_inv
    assert bool(((most <= 448) & (most > 224)).all())
    assert torch.equal(torch.frexp(scale_inv).mantissa, torch.full_like(scale_inv, 0.5))
    undone = rows[:24].float() * scale_inv[:, None]
    bound = torch.maximum(x.abs() * 2**-4, scale_inv[:, None] * 2**-10)
    assert bool(((undone - x).abs() <= bound).all())
    alone = quantize_rows(x[3:4], multiple=1, backend=backend)  # others beside it change nothing
    assert torch.equal(alone.rows.view(torch.uint8), rows[3:4].view(torch.uint8))


@pytest.mark.parametrize("backend", BACKENDS)
def test_special_rows(device, backend):
    inf, nan = float("inf"), float("nan")
    x = torch.tensor(
        [
            [0.0, -0.0],
            [inf, 1.0],
            [1.0, nan],
            [448.0, -1.0],
            [449.0, 0.0],
            [1e-45, 0.0],
            [3e38, 1.0],
        ]
    ).to(device)
    rows, scale_inv = quantize_rows(x, multiple=1, backend=backend)
    found = scale_inv.tolist()
    assert found[0] == 1.0 and found[3:6] == [1.0, 2.0, 2.0**-126] and found[6] == 2.0**120
    assert all(value != value for value in found[1:3])
    assert rows[3].float().tolist() == [448.0, -1.0] and rows[4, 0].float() == 224.0
    assert rows.shape == (7, 2) and not rows[0].float().any()
    assert quantize_rows(x[:0], backend=backend).rows.shape == (0, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_undoing_rounds_once(device, backend, dtype):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(9, 5000, generator=generator).to(device, dtype)
    factor = torch.exp2(torch.arange(-4.0, 5.0)).to(device)
    expected = (z.double() * factor.double()[:, None] / 0.25).to(dtype)
    found = z.clone()
    assert rescale_rows_(found, factor, applied=0.25, backend=backend) is found
    assert torch.equal(found, expected)
    bias = torch.randn(5000, generator=generator).to(device, dtype)
    found = rescale_rows_(z.clone(), factor, bias, applied=0.25, backend=backend)
    expected = (z.float() * (factor * 4)[:, None]).double() + bias.double()
    torch.testing.assert_close(found, expected.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)
    factor[2] = float("nan")
    found = rescale_rows_(z.clone(), factor, backend=backend)
    assert bool(found[2].isnan().all()) and not bool(found[[0, 1, 3]].isnan().any())
    assert rescale_rows_(z[:0], factor[:0], backend=backend).shape == (0, 5000)


def test_refusals(device):
    x = torch.ones(4, 8, device=device)
    for wrong in (x[0], x.long(), torch.empty(2, 0, device=device)):
        with pytest.raises(KernelError, match="quantize_rows: x is"):
            quantize_rows(wrong)
    with pytest.raises(KernelError, match="rescale_rows_: z is"):
        rescale_rows_(x.t(), torch.ones(8, device=device))
    with pytest.raises(KernelError, match="rescale_rows_: scale_inv"):
        rescale_rows_(x, torch.ones(3, device=device))
    with pytest.raises(KernelError, match="rescale_rows_: bias"):
        rescale_rows_(x, torch.ones(4, device=device), x[0, :4])
    with pytest.raises(KernelError, match="applied"):
        rescale_rows_(x, torch.ones(4, device=device), applied=3.0)
