"""Weight gradients with strided MVUE groups: both operands have their tokens in one order."""

from __future__ import annotations

import pytest
import torch

from megasparse.fp8.current import CurrentScaling
from megasparse.fp8.delayed import DelayedScaling
from megasparse.kernels import mvue24, swiglu_fused, transposable24_mask
from megasparse.sparsity.autograd.linear import linear
from megasparse.sparsity.autograd.norm import norm_to_float8
from megasparse.sparsity.gemms.choice import GemmChooser
from megasparse.sparsity.gemms.dense import ReferenceSparseGemms
from megasparse.sparsity.gemms.dense_fp8 import OperandQuantizers
from megasparse.sparsity.gemms.packed import PackedSparseGemms
from megasparse.sparsity.gemms.packed_fp8 import PackedFp8Gemms
from megasparse.sparsity.projection import Projected
from megasparse.sparsity.recipe import make_recipe
from megasparse.sparsity.shard import ShardSlice
from tests.transformer_engine import needs_transformer_engine

N, K, T = 128, 256, 256
RECIPE = make_recipe("fst", mvue_groups="strided")
CHANNELS = (ShardSlice(0, 64, N),)
FP8_ERROR = 0.045  # as in test_packed_fp8.py


def operands(device, tokens=T):
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(tokens, K, generator=generator), torch.randn(N, K, generator=generator)
    dz = torch.randn(tokens, N, generator=generator)
    return (t.to(device).bfloat16() for t in (x, w, dz))


def expected(dz, x, tokens=T):
    """MVUE(dZ)^T X with tokens as they come; groups are of the tokens up to whole tiles."""
    dz, x = (torch.nn.functional.pad(t.float(), (0, 0, 0, tokens - t.shape[0])) for t in (dz, x))
    drawn = mvue24(dz, seed=5, dim=0, offsets=(0, 64), strided=True, backend="reference")
    return drawn.double().t() @ x.double()


def error(found, wanted):
    return float((found.double() - wanted).norm() / wanted.norm())


def fp8_gemms(device, w, kind):
    needs_transformer_engine(device)
    scales = kind(device) if kind is DelayedScaling else kind()
    slots = OperandQuantizers.of(scales)
    scales.allocate()
    chooser = GemmChooser(None) if w.is_cuda else None
    gemms = PackedFp8Gemms(RECIPE, CHANNELS, slots, chooser=chooser)
    gemms.refill(w, Projected(transposable24_mask(w)))
    return gemms


def test_computed_densely():
    x, w, dz = operands("cpu")
    gemms = ReferenceSparseGemms(RECIPE, CHANNELS)
    gemms.refill(w, Projected(transposable24_mask(w)))
    found = gemms.grad_weight(gemms.prepare_grad_output(dz.float(), 5), (x.float(),))
    torch.testing.assert_close(found.double(), expected(dz, x), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", [DelayedScaling, CurrentScaling])
@pytest.mark.parametrize("tokens", [T, 150])
def test_in_fp8(device, kind, tokens):
    x, w, dz = operands(device, tokens)
    gemms = fp8_gemms(device, w, kind)
    w.requires_grad_()
    linear(x, w, gemms, seed=5).backward(dz)
    assert error(w.grad, expected(dz, x)) < FP8_ERROR
    # Of an input that was gathered in full: what autograd saves is made in the backward pass.
    found = gemms.grad_weight(gemms.prepare_grad_output(dz, 5), gemms.save_input(x))
    assert torch.equal(found, w.grad)


def test_of_inputs_that_were_quantized_before(device):
    """By a norm, by an activation, and gathered over ranks in 8 bits."""
    x, w, dz = operands(device)
    gemms = fp8_gemms(device, w, DelayedScaling)
    gemms.output(x), gemms.prepare_grad_output(dz, 5)  # now there are scales
    prepared = gemms.prepare_grad_output(dz, 5)
    gain = torch.ones(K, device=device).bfloat16().requires_grad_()
    scale = gemms.input_scale(lambda: pytest.fail("it has one"))
    one = norm_to_float8(
        x,
        gain,
        None,
        centred=False,
        eps=1e-5,
        scale=scale,
        trained=True,
        strided=gemms.strided,
    )
    normed = torch.nn.functional.rms_norm(x, (K,), gain.detach(), 1e-5)
    _, saved = gemms.output_of_quantized(one.rows, one.columns, T, scale)
    for operand in (saved, gemms.save_quantized(one.rows)):
        assert error(gemms.grad_weight(prepared, operand), expected(dz, normed)) < FP8_ERROR
    fused = torch.cat([x, x.flip(0)], 1)
    _, saved = gemms.output_of_activated(fused, "swiglu", save=True)
    found = gemms.grad_weight(prepared, saved)
    assert error(found, expected(dz, swiglu_fused(fused))) < FP8_ERROR


@pytest.mark.parametrize("tokens", [T, 1000])
def test_packed_in_16_bits(device, tokens):
    tokens = tokens if device.type == "cuda" else tokens // 5
    x, w, dz = operands(device, tokens)
    gemms = PackedSparseGemms(RECIPE, CHANNELS, chooser=GemmChooser(None))
    gemms.refill(w, Projected(transposable24_mask(w)))
    found = gemms.grad_weight(gemms.prepare_grad_output(dz, 5), (x,))
    assert error(found, expected(dz, x, -(-tokens // 64) * 64)) < 8e-3
