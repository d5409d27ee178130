"""4-bit and FP8 weights: zeros stay, packing is exact, sizes are what they say, AWQ helps."""

from __future__ import annotations

import pytest
import torch

from megasparse.compress.quantize import FORMATS, Quantized, awq_scales, quantize
from megasparse.errors import ConfigError
from megasparse.kernels import is_24, prune24_mask

N, K, GROUP = 6, 64, 32


def _weight(sparse=True):
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(1))
    mask = prune24_mask(weight)
    return (weight * mask, mask) if sparse else (weight, None)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("sparse", [True, False])
def test_packing_is_exact_and_zeros_stay(kind, sparse):
    weight, mask = _weight(sparse)
    if sparse:
        weight[0] = 0.0  # nothing left in a row: its scale must not be a division by zero
    quantized = quantize(weight, kind, GROUP, mask)
    stored = quantized.pack()
    again = Quantized.unpack(stored, K)
    assert torch.equal(again.dequantize(), quantized.dequantize())
    if sparse:
        assert torch.equal(again.mask, mask) and is_24(again.dequantize())
        assert not again.dequantize()[weight == 0].any()
    bits = sum(t.numel() * t.element_size() for t in stored.values()) * 8
    values = (4 if kind == "int4" else 8) * (0.5 if sparse else 1)
    scales = 16 / GROUP if kind == "int4" else 32 / K
    assert bits == N * K * (values + (1 if sparse else 0) + scales)


@pytest.mark.parametrize(("kind", "relative"), [("int4", 0.5 / 7), ("fp8", 2**-4)])
def test_values_are_the_nearest(kind, relative):
    weight, mask = _weight()
    error = (quantize(weight, kind, GROUP, mask).dequantize() - weight).abs()
    if kind == "fp8":  # half a unit in the last place; below the normal numbers half a step
        smallest = weight.abs().amax(1, keepdim=True) / 448 * 2.0**-10
        assert (error <= weight.abs() * relative * 1.001 + smallest * 1.001).all()
        return
    largest = weight.view(N, -1, GROUP).abs().amax(-1, keepdim=True)
    assert (error.view(N, -1, GROUP) <= largest * relative * 1.002).all()


def test_activation_aware_scales_lower_the_error_where_inputs_are_large():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(500, K, generator=generator)
    x[:, ::16] *= 30.0
    weight, mask = _weight()
    scales, alpha = awq_scales(weight, x.t() @ x, x.abs().mean(0), GROUP)

    def error(s):
        back = quantize(weight * s, "int4", GROUP, mask).dequantize() / s
        return float(((weight - back) @ x.t()).square().sum())

    assert alpha > 0 and error(scales) < 0.8 * error(torch.ones(K))
    # Without outliers, and with one token, there is little to win: never worse than no scaling.
    flat, _ = awq_scales(weight, torch.eye(K), torch.ones(K), GROUP)
    assert torch.equal(flat, torch.ones(K))


def test_a_group_that_does_not_divide_is_refused():
    with pytest.raises(ConfigError, match="group_size 48 does not divide 64"):
        quantize(_weight()[0], "int4", 48)


def test_codes_are_nearest_for_the_scales_that_are_stored():
    """Float16 rounds a scale by up to 2^-11: codes for the unrounded one would be off by one."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(256, 128, generator=generator) * torch.rand(256, 1, generator=generator)
    made = quantize(weight, "int4", GROUP)
    scales = made.scales.double().repeat_interleave(GROUP, 1)
    expected = (weight.double() / scales).round().clamp(-7, 7)
    ties = ((weight.double() / scales).frac().abs() - 0.5).abs() < 1e-6
    assert torch.equal(made.values.double()[~ties], expected[~ties])


@pytest.mark.parametrize("seed", range(3))
def test_activation_aware_scales_are_the_best_of_the_grid(seed):
    """The error of the layer as it is computed in the end, from the inputs themselves."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(300, K, generator=generator) * torch.rand(K, generator=generator).pow(3) * 9
    weight = torch.randn(N, K, generator=generator)
    mean = x.abs().mean(0)

    def error(alpha):
        s = mean.clamp(min=1e-4).pow(alpha)
        s = s / (s.max() * s.min()).sqrt()
        back = quantize(weight * s, "int4", GROUP).dequantize() / s
        return float((x.double() @ (weight - back).double().t()).square().sum())

    scales, alpha = awq_scales(weight, x.t() @ x, mean, GROUP)
    errors = {step / 20: error(step / 20) for step in range(20)}
    assert alpha > 0 and errors[alpha] <= min(errors.values()) * (1 + 1e-4)
    s = mean.clamp(min=1e-4).pow(alpha)
    torch.testing.assert_close(scales, s / (s.max() * s.min()).sqrt())
