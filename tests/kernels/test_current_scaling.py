"""Scales of the moment and the product that undoes them: Triton against the definition."""

from __future__ import annotations

import math

import pytest
import torch

from megasparse.errors import KernelError
from megasparse.kernels import mvue24, rescale_, scale_inv_of, scales_of_amax
from tests.kernels.poison import poison_new_tensors

BACKENDS = ["reference", "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FLOAT32_MAX = torch.finfo(torch.float32).max


@pytest.mark.parametrize("maximum", [448.0, 57344.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_scales_are_the_format_over_the_amax(device, backend, maximum, monkeypatch):
    poison_new_tensors(monkeypatch)
    for amax in (1.0, 3.0, 1e-5, 448.0, 7e19):
        found = scales_of_amax(
            torch.tensor([amax], device=device), maximum=maximum, backend=backend
        )
        exact = torch.tensor(amax)  # as float32 has it
        scale, draw = torch.tensor(maximum) / exact, torch.tensor(448.0) / (2 * exact)
        expected = [scale, 1 / scale, draw, 1 / draw]
        assert [float(value) for value in found] == [float(value) for value in expected]
        assert all(value.shape == () and value.data_ptr() % 16 == 0 for value in found)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scales_of_unusable_magnitudes(device, backend):
    for amax in (0.0, float("inf"), float("nan")):
        found = scales_of_amax(torch.tensor([amax], device=device), backend=backend)
        assert [float(value) for value in found] == [1.0] * 4
    tiny = scales_of_amax(torch.tensor([1e-37], device=device), backend=backend)
    assert float(tiny.scale) == FLOAT32_MAX and float(tiny.scale_inv) > 0


@pytest.mark.parametrize("exact", [True, False])
def test_no_draw_is_above_twice_the_largest(device, exact):
    """And groups of equals reach it: the bound is not too wide."""
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(256, 512, generator=generator).pow(3).to(device)
    g[:64] = 1.0
    drawn = mvue24(g, seed=3, exact=exact)
    largest = g.view(256, -1, 4).abs().amax(-1, keepdim=True)
    ratios = drawn.view(256, -1, 4).abs() / largest
    assert float(ratios.max()) == pytest.approx(2.0, rel=1e-5)
    assert not exact or float(ratios.max()) <= 2.0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rescale_rounds_once(device, backend, dtype):
    generator = torch.Generator().manual_seed(0)
    z = (torch.randn(37, 131, generator=generator) * 8).to(device, dtype)
    z[0, 0], z[3, 4], z[36, 130] = float("nan"), float("-inf"), 0.0
    a, b = (torch.tensor(value, device=device) for value in (1.0 / 3, 0.737))
    expected = (z.float() * (a * b)).to(dtype)
    found = z.clone()
    assert rescale_(found, a, b, backend=backend) is found
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert rescale_(found[:0], a, b, backend=backend).shape == (0, 131)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_magnitude_is_found_anywhere(device, dtype, backend, monkeypatch):
    """At the edges of tiles and of the matrix, in strided rows whose other entries are larger."""
    whole = torch.randn(131, 1536, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    whole[:, 1403:] = 1000.0
    for row, column in ((7, 1023), (64, 1024), (130, 1402)):
        w = whole.clone()[:, :1403]
        w[row, column] = -100.0
        with monkeypatch.context() as patch:
            poison_new_tensors(patch)
            found = scale_inv_of(w, backend=backend)
        assert found.shape == () and found.dtype == torch.float32
        expected = torch.tensor(100.0) / torch.tensor(448.0)
        assert torch.equal(found.cpu(), expected)
    assert torch.equal(scale_inv_of(w.t(), backend=backend).cpu(), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_tensors(device, dtype, backend):
    w = torch.zeros(5, 7, dtype=dtype, device=device)
    assert scale_inv_of(w, backend=backend) == 1
    w[4, 6] = 6e-8 if dtype == torch.float16 else 1e-40
    smallest = scale_inv_of(w, backend=backend)
    assert smallest > 0 and smallest.reciprocal().isfinite()
    w[0, 0] = -float("inf")
    assert scale_inv_of(w, backend=backend) == float("inf")
    w[2, 3] = float("nan")
    assert scale_inv_of(w, backend=backend).isnan()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rescale_makes_up_for_another_factor(device, backend, dtype):
    """A product with the wrong power of two, corrected, has the bits of the right one."""
    generator = torch.Generator().manual_seed(0)
    product = torch.randn(40, 3000, generator=generator).to(device)
    a, b = (torch.tensor(2.0**power, device=device) for power in (-7, 3))
    right = (product * a * b).to(dtype)
    for applied in (2.0**-4, 2.0**-9, 1.0, 2.0**20):
        found = (product * applied).to(dtype)
        assert torch.equal(rescale_(found, a, b, applied=applied, backend=backend), right)


def test_rescale_leaves_what_has_its_factor(device):
    z = torch.full((64, 64), float("nan"), device=device)  # a pass would write it
    a, b = torch.tensor(0.25, device=device), torch.tensor(2.0, device=device)
    before = z.clone()
    assert torch.equal(rescale_(z, a, b, applied=0.5).view(torch.int32), before.view(torch.int32))
    with pytest.raises(KernelError, match="applied is 3, expected a power of two"):
        rescale_(z, a, b, applied=3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_powers_of_two_round_down(device, backend):
    for amax in (1.0, 3.0, 1e-5, 448.0, 7e19, 1e-37, 224.0, 223.0):
        given = torch.tensor([amax], device=device)
        exact = scales_of_amax(given, backend=backend)
        found = scales_of_amax(given, power_of_two=True, backend=backend)
        for scale, scale_inv, bound in (
            (found.scale, found.scale_inv, exact.scale),
            (found.draw_scale, found.draw_scale_inv, exact.draw_scale),
        ):
            largest = min(2.0 ** math.floor(math.log2(float(bound))), 2.0**126)
            assert float(scale) == largest and float(scale_inv) == 1 / largest
    for amax in (0.0, float("inf"), float("nan")):
        given = torch.tensor([amax], device=device)
        assert [float(v) for v in scales_of_amax(given, power_of_two=True, backend=backend)] == [
            1.0
        ] * 4


def test_refusals(device):
    z, one = torch.ones(4, 4, device=device), torch.ones((), device=device)
    with pytest.raises(KernelError, match=r"expected torch.float32 \(1,\)"):
        scales_of_amax(one)
    with pytest.raises(KernelError, match="expected contiguous floats"):
        rescale_(torch.ones(2, 4, device=device).t(), one, one)
    with pytest.raises(KernelError, match="b is a torch.float64"):
        rescale_(z, one, one.double())
    with pytest.raises(KernelError, match="expected one of reference, triton"):
        rescale_(z, one, one, backend="cusparselt")
    for w in (torch.ones(4), torch.ones(0, 4), torch.ones(4, 4, dtype=torch.float64)):
        with pytest.raises(KernelError, match="expected a non-empty matrix"):
            scale_inv_of(w.to(device))
    with pytest.raises(KernelError, match="expected one of reference, triton"):
        scale_inv_of(torch.ones(4, 4, device=device), backend="cusparselt")
