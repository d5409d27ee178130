"""Sparse tensor-core GEMMs against the reference GEMMs with the same operands and draws."""

from __future__ import annotations

import pytest
import torch

from megasparse.kernels import prune24_mask, transposable24_mask
from megasparse.sparsity.gemms import ReferenceSparseGemms
from megasparse.sparsity.packed_gemms import PackedSparseGemms, refusal
from megasparse.sparsity.recipe import make_recipe
from megasparse.sparsity.shard import Section


def test_refusals_name_the_reason():
    recipe = make_recipe("fst")
    assert refusal(torch.zeros(64, 64, dtype=torch.bfloat16), recipe) == "the weight is on cpu"


@pytest.mark.gpu
def test_refusals_on_a_gpu(device):
    recipe = make_recipe("fst")
    assert "float32" in refusal(torch.zeros(64, 64, device=device), recipe)
    small = torch.zeros(32, 64, device=device, dtype=torch.bfloat16)
    assert "multiples of 64" in refusal(small, recipe)
    fp8 = make_recipe("s_ste", simulate_fp8=True)
    assert "simulate_fp8" in refusal(torch.zeros(64, 64, device=device).bfloat16(), fp8)
    assert refusal(torch.zeros(64, 64, device=device).bfloat16(), recipe) is None


@pytest.mark.gpu
@pytest.mark.parametrize("transposable", [False, True])
@pytest.mark.parametrize("mvue", ["off", "exact", "approximate"])
@pytest.mark.parametrize("tokens", [64, 1000])
def test_equal_to_the_reference(device, transposable, mvue, tokens):
    n, k = 256, 384
    w = torch.randn(n, k, device=device, dtype=torch.bfloat16)
    mask = transposable24_mask(w) if transposable else prune24_mask(w)
    effective = torch.where(mask, w, torch.zeros((), device=device, dtype=w.dtype))
    channels = (Section(0, 0, 128), Section(128, 512, 128))
    flag = torch.zeros(1, dtype=torch.int32, device=device)
    packed = PackedSparseGemms(effective, mvue, channels, transposable, flag)
    reference = ReferenceSparseGemms(effective.double(), mvue, channels)
    x = torch.randn(tokens, k, device=device, dtype=torch.bfloat16)
    dz = torch.randn(tokens, n, device=device, dtype=torch.bfloat16)

    def close(a, b):
        error = (a.double() - b).norm() / b.norm()
        assert float(error) < 4e-3, float(error)  # bfloat16 rounding of the output

    close(packed.output(x), reference.output(x.double()))
    close(packed.grad_input(dz), reference.grad_input(dz.double()))
    # The draws depend on bfloat16 gradients, so the reference prunes those before it widens them.
    pruned = reference._prune_along_tokens(dz, 7) if mvue != "off" else dz
    close(packed.grad_weight(dz, x, 7), pruned.double().t() @ x.double())
    assert int(flag) == 0


@pytest.mark.gpu
def test_an_operand_that_is_not_24_is_flagged(device):
    flag = torch.zeros(1, dtype=torch.int32, device=device)
    w = torch.randn(64, 64, device=device, dtype=torch.bfloat16)
    PackedSparseGemms(w, "off", (Section(0, 0, 64),), False, flag)
    assert int(flag) == 1
