"""The gradient of an activation fused with what 8-bit GEMMs want of it: the two steps in one."""

from __future__ import annotations

import pytest
import torch

from megasparse.errors import KernelError
from megasparse.kernels import activation_backward, activation_grad_pack24, grad_pack24, unpack24
from tests.kernels.gated_cases import (
    BF16,
    E4M3,
    E5M2,
    FP16,
    SHAPES,
    bits,
    numbers,
    projection,
    same,
    scalar,
)
from tests.kernels.poison import poison_new_tensors

BACKENDS = ["reference", "triton"]
# Which places the sections have; the whole layer's channels, one section, or one for each half.
SECTIONS = [None, "whole", "parts", "whole", "parts", "whole", None]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(
    ("tokens", "width", "dtype", "activation", "sections"),
    [(*shape, kind) for shape, kind in zip(SHAPES, SECTIONS, strict=True)],
)
def test_backward_is_the_two_steps(
    device, monkeypatch, tokens, width, dtype, activation, exact, sections, backend
):
    fused = projection(tokens, width, device, dtype, exact, activation)
    dy = numbers(tokens, width, device, dtype, 1)
    dz = activation_backward(dy, fused, activation, backend="reference")
    dz = torch.nn.functional.pad(dz, (0, 0, 0, -tokens % 128))
    channels = {
        None: None,
        "whole": ((0, 64, fused.shape[1]),),
        "parts": ((0, 64, width), (width, 9 * width, width)),
    }[sections]
    row_dtype = {None: E5M2, "whole": None, "parts": E4M3}[sections]
    arguments = {"seed": 11, "packed_scale": scalar(4.0, device), "channels": channels}
    arguments |= {"row_dtype": row_dtype}
    if sections is not None:  # and tokens in two runs, as context parallelism has them
        arguments["tokens"] = ((0, 8), (64, 4096))
    if row_dtype is not None:
        arguments["row_scale"] = scalar(16.0, device)
    maxima = torch.zeros(4, device=device).split(1)
    sums = None if sections == "whole" else torch.full((2, fused.shape[1]), 7.0, device=device)
    expected_sums, found_sums = (None, None) if sums is None else sums
    row, packed = grad_pack24(
        dz,
        row_amax=maxima[0],
        packed_amax=maxima[1],
        sums=expected_sums,
        backend="reference",
        **arguments,
    )
    with monkeypatch.context() as patch:
        poison_new_tensors(patch)
        found, repacked = activation_grad_pack24(
            dy,
            fused,
            activation=activation,
            row_amax=maxima[2],
            packed_amax=maxima[3],
            sums=found_sums,
            backend=backend,
            **arguments,
        )
    if sums is not None:
        torch.testing.assert_close(found_sums, expected_sums, rtol=1e-3, atol=0.1)
    if row is None:
        assert found is None
    else:
        same(found, row, exact)
    assert repacked.shape == packed.shape == (fused.shape[1], dz.shape[0])
    assert repacked.scale == packed.scale
    same(unpack24(repacked), unpack24(packed), exact)
    if exact:
        assert torch.equal(repacked.buffer, packed.buffer)
    for found_amax, expected in zip(maxima[2:], maxima[:2], strict=True):
        torch.testing.assert_close(found_amax, expected, rtol=0 if exact else 1e-2, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("activation", ["swiglu", "geglu", "gelu"])
def test_on_a_gpu_it_is_the_two_kernels_to_the_last_bit(device, activation, dtype):
    tokens, width = 5000, 1088
    fused = projection(tokens, width, device, dtype, False, activation)
    dy = numbers(tokens, width, device, dtype, 1)
    scale = scalar(3.0, device)
    dz = activation_backward(dy, fused, activation)
    dz = torch.nn.functional.pad(dz, (0, 0, 0, -tokens % 128))
    for row_dtype in (E4M3, E5M2):
        arguments = {"seed": 2, "row_dtype": row_dtype}
        arguments |= {"row_scale": scale, "packed_scale": scale}
        row, packed = grad_pack24(dz, **arguments)
        found, repacked = activation_grad_pack24(dy, fused, activation=activation, **arguments)
        assert torch.equal(bits(found), bits(row))
        assert torch.equal(repacked.buffer, packed.buffer)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_is_not_hidden(device, backend):
    fused = torch.zeros(128, 128, device=device, dtype=BF16)
    dy = torch.ones(128, 64, device=device, dtype=BF16)
    fused[5, 7], fused[:, 64:] = float("nan"), 1.0
    one, amax = scalar(1.0, device), torch.zeros(2, device=device).split(1)
    arguments = {"row_amax": amax[0], "packed_amax": amax[1], "backend": backend}
    row, _ = activation_grad_pack24(dy, fused, seed=1, row_scale=one, packed_scale=one, **arguments)
    assert row.float().isnan().nonzero().tolist() == [[5, 7], [5, 71]]
    assert all(a.isnan() for a in amax)


def test_refusals():
    one, fused, dy = torch.ones(()), torch.zeros(4, 256).half(), torch.zeros(4, 128).half()
    arguments = {"seed": 1, "packed_scale": one, "row_dtype": None}
    with pytest.raises(KernelError, match="dy is"):
        activation_grad_pack24(dy[:3], fused, **arguments)
    with pytest.raises(KernelError, match="192 channels"):
        activation_grad_pack24(dy[:, :96], fused[:, :192], **arguments)
    with pytest.raises(KernelError, match="cut a run of 128"):
        channels = ((0, 0, 64), (64, 64, 192))
        activation_grad_pack24(dy, fused, channels=channels, **arguments)
    with pytest.raises(KernelError, match="activation_grad_pack24: row_scale is missing"):
        activation_grad_pack24(dy, fused, seed=1, packed_scale=one)
