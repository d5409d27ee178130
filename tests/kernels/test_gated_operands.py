"""SwiGLU fused with what an 8-bit GEMM wants of it, forward and backward: the two steps in one."""

from __future__ import annotations

import pytest
import torch

from megasparse.errors import KernelError
from megasparse.kernels import (
    grad_pack24,
    swiglu_float8,
    swiglu_fused,
    swiglu_fused_backward,
    swiglu_grad_pack24,
    unpack24,
)
from tests.kernels.poison import poison_new_tensors

BACKENDS = ["reference", "triton"]
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
BF16, FP16 = torch.bfloat16, torch.float16
SHAPES = [(128, 64, BF16), (384, 192, FP16), (131, 128, BF16), (3, 64, BF16)]
# Which places the sections have; the whole layer's channels, one section, or one for each half.
SECTIONS = [None, "whole", "parts", "whole"]


def numbers(tokens, width, device, dtype, number=0):
    generator = torch.Generator().manual_seed(tokens + width + number)
    x = torch.randn(tokens, width, generator=generator)
    return (x * torch.randn(tokens, width, generator=generator).exp()).to(dtype).to(device)


def projection(tokens, width, device, dtype, exact):
    """[gate | x]; with `exact` gates whose sigmoid is 1 in float32: the same by every formula."""
    fused = numbers(tokens, 2 * width, device, dtype)
    if exact:
        fused[:, :width] = fused[:, :width].abs() / 8 + 20.0
    return fused


def scalar(x, device):
    return torch.tensor(float(x), device=device)


def bits(t):
    return t.contiguous().view(torch.uint8)


def same(found, expected, exact):
    """Bit for bit; or, where a sigmoid's last bit may decide, all but a few bytes."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    wrong = bits(found) != bits(expected)
    assert float(wrong.float().mean()) <= (0.0 if exact else 2e-3)


def padded(t, tokens):
    return torch.nn.functional.pad(t.float(), (0, 0, 0, -tokens % 128))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(("tokens", "width", "dtype"), SHAPES)
def test_forward_is_the_two_steps(device, monkeypatch, tokens, width, dtype, exact, backend):
    fused = projection(tokens, width, device, dtype, exact)
    y = swiglu_fused(fused, backend="reference").float()
    scale = scalar(600.0 / float(y.abs().max()), device)  # the largest saturate
    expected = padded((y * scale).clamp(-448, 448), tokens).to(E4M3)
    amax = scalar(0.0, device).view(1)
    with monkeypatch.context() as patch:
        poison_new_tensors(patch)
        rows, columns = swiglu_float8(fused, scale=scale, amax=amax, backend=backend)
    same(rows, expected, exact)
    assert columns.is_contiguous() and torch.equal(bits(columns), bits(rows.t()))
    assert not bits(rows[tokens:]).any()
    torch.testing.assert_close(amax, y.abs().max().view(1), rtol=0 if exact else 1e-2, atol=0)
    # Half of a wider tensor, without the transposed copy, and a larger maximum that stays.
    wide = torch.cat([fused, fused], 1)[:, : 2 * width]
    amax.fill_(1e9)
    again, none = swiglu_float8(wide, scale=scale, transposed=False, amax=amax, backend=backend)
    assert none is None and torch.equal(bits(again), bits(rows)) and float(amax) == 1e9


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(
    ("tokens", "width", "dtype", "sections"),
    [(*shape, kind) for shape, kind in zip(SHAPES, SECTIONS, strict=True)],
)
def test_backward_is_the_two_steps(
    device, monkeypatch, tokens, width, dtype, exact, sections, backend
):
    fused = projection(tokens, width, device, dtype, exact)
    dy = numbers(tokens, width, device, dtype, 1)
    dz = swiglu_fused_backward(dy, fused, backend="reference")
    dz = torch.nn.functional.pad(dz, (0, 0, 0, -tokens % 128))
    channels = {
        None: None,
        "whole": ((0, 64, 2 * width),),
        "parts": ((0, 64, width), (width, 9 * width, width)),
    }[sections]
    row_dtype = {None: E5M2, "whole": None, "parts": E4M3}[sections]
    arguments = {"seed": 11, "packed_scale": scalar(4.0, device), "channels": channels}
    arguments |= {"row_dtype": row_dtype}
    if row_dtype is not None:
        arguments["row_scale"] = scalar(16.0, device)
    maxima = torch.zeros(4, device=device).split(1)
    row, packed = grad_pack24(
        dz, row_amax=maxima[0], packed_amax=maxima[1], backend="reference", **arguments
    )
    with monkeypatch.context() as patch:
        poison_new_tensors(patch)
        found, repacked = swiglu_grad_pack24(
            dy, fused, row_amax=maxima[2], packed_amax=maxima[3], backend=backend, **arguments
        )
    if row is None:
        assert found is None
    else:
        same(found, row, exact)
    assert repacked.shape == packed.shape == (2 * width, dz.shape[0])
    assert repacked.scale == packed.scale
    same(unpack24(repacked), unpack24(packed), exact)
    if exact:
        assert torch.equal(repacked.buffer, packed.buffer)
    for found_amax, expected in zip(maxima[2:], maxima[:2], strict=True):
        torch.testing.assert_close(found_amax, expected, rtol=0 if exact else 1e-2, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_on_a_gpu_they_are_the_two_kernels_to_the_last_bit(device, dtype):
    tokens, width = 5000, 1088
    fused, dy = projection(tokens, width, device, dtype, False), None
    dy = numbers(tokens, width, device, dtype, 1)
    scale = scalar(3.0, device)
    y = swiglu_fused(fused).float()
    rows, columns = swiglu_float8(fused, scale=scale)
    expected = padded((y * scale).clamp(-448, 448), tokens).to(E4M3)
    assert torch.equal(bits(rows), bits(expected)) and torch.equal(bits(columns), bits(rows.t()))
    dz = torch.nn.functional.pad(swiglu_fused_backward(dy, fused), (0, 0, 0, -tokens % 128))
    for row_dtype in (E4M3, E5M2):
        arguments = {"seed": 2, "row_dtype": row_dtype}
        arguments |= {"row_scale": scale, "packed_scale": scale}
        row, packed = grad_pack24(dz, **arguments)
        found, repacked = swiglu_grad_pack24(dy, fused, **arguments)
        assert torch.equal(bits(found), bits(row))
        assert torch.equal(repacked.buffer, packed.buffer)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_is_not_hidden(device, backend):
    fused = torch.zeros(128, 128, device=device, dtype=BF16)
    dy = torch.ones(128, 64, device=device, dtype=BF16)
    fused[5, 7], fused[:, 64:] = float("nan"), 1.0
    one, amax = scalar(1.0, device), torch.zeros(3, device=device).split(1)
    rows, columns = swiglu_float8(fused, scale=one, amax=amax[0], backend=backend)
    assert rows.float()[5, 7].isnan() and columns.float()[7, 5].isnan()
    assert int(rows.float().isnan().sum()) == 1
    row, _ = swiglu_grad_pack24(
        dy, fused, seed=1, row_scale=one, packed_scale=one, row_amax=amax[1], packed_amax=amax[2],
        backend=backend,
    )  # fmt: skip
    assert row.float().isnan().nonzero().tolist() == [[5, 7], [5, 71]]
    assert all(a.isnan() for a in amax)


def test_refusals():
    one, fused, dy = torch.ones(()), torch.zeros(4, 256).half(), torch.zeros(4, 128).half()
    for wrong in (fused.float(), fused[:, :192], fused[:0], fused[0]):
        with pytest.raises(KernelError, match="swiglu_float8: fused is"):
            swiglu_float8(wrong, scale=one)
    with pytest.raises(KernelError, match="swiglu_float8: scale is"):
        swiglu_float8(fused, scale=torch.ones(1))
    with pytest.raises(KernelError, match="swiglu_float8: amax is"):
        swiglu_float8(fused, scale=one, amax=one)
    arguments = {"seed": 1, "packed_scale": one, "row_dtype": None}
    with pytest.raises(KernelError, match="dy is"):
        swiglu_grad_pack24(dy[:3], fused, **arguments)
    with pytest.raises(KernelError, match="192 channels"):
        swiglu_grad_pack24(dy[:, :96], fused[:, :192], **arguments)
    with pytest.raises(KernelError, match="cut one of the halves"):
        channels = ((0, 0, 64), (64, 64, 192))
        swiglu_grad_pack24(dy, fused, channels=channels, **arguments)
    with pytest.raises(KernelError, match="swiglu_grad_pack24: row_scale is missing"):
        swiglu_grad_pack24(dy, fused, seed=1, packed_scale=one)
