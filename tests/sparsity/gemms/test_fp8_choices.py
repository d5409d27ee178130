"""FP8 GEMMs with 2:4 operands by what was measured to be faster, and the room that draws need."""

from __future__ import annotations

import pytest
import torch

from megasparse.fp8.delayed import DelayedScaling
from megasparse.kernels import (
    activation_backward,
    mvue24,
    prune24_mask,
    transposable24_mask,
)
from megasparse.sparsity.gemms.choice import Choice, GemmChooser
from megasparse.sparsity.gemms.dense_fp8 import OperandQuantizers
from megasparse.sparsity.gemms.packed_fp8 import PackedFp8Gemms
from megasparse.sparsity.projection import Projected
from megasparse.sparsity.recipe import make_recipe
from megasparse.sparsity.shard import ShardSlice, TokenShare
from tests.transformer_engine import needs_transformer_engine

N, K, T = 128, 384, 150
FP8_ERROR = 0.045  # as in test_packed_fp8.py


def quantizers(device):
    scales = DelayedScaling(device)
    slots = OperandQuantizers.of(scales)
    scales.allocate()
    return slots


def operands(device):
    generator = torch.Generator().manual_seed(0)
    shapes = ((T, K), (N, K), (T, N))
    return [torch.randn(s, generator=generator).to(device).bfloat16() for s in shapes]


def error(found, expected):
    expected = expected.double()
    return float((found.double() - expected).norm() / expected.norm())


def test_draws_have_room_for_what_they_divide_by(device):
    """MVUE divides by probabilities: the first scale of draws is of four times what dZ has."""
    needs_transformer_engine(device)
    _, w, dz = operands(device)
    gemms = PackedFp8Gemms(make_recipe("fst"), (ShardSlice(0, 0, N),), quantizers(device))
    gemms.refill(w, Projected(transposable24_mask(w)))
    found = gemms.prepare_grad_output(dz, 5)
    assert float(found.along_scale.scale) == float(found.row_scale.scale) / 4


def test_a_gradient_behind_an_activation_is_drawn_by_the_same_tokens(device):
    """Of context parallelism: those of this rank, however wide the activation is."""
    needs_transformer_engine(device)
    _, w, _ = operands(device)
    how = {"tokens": TokenShare(1, 2), "chooser": GemmChooser(None) if w.is_cuda else None}
    gemms = PackedFp8Gemms(make_recipe("fst"), (ShardSlice(0, 0, N),), quantizers(device), **how)
    gemms.refill(w, Projected(transposable24_mask(w)))
    generator = torch.Generator().manual_seed(1)
    dy, projected = (
        torch.randn(256, width, generator=generator).to(device).bfloat16() for width in (N // 2, N)
    )
    dz = activation_backward(dy, projected, "swiglu")
    gemms.prepare_grad_output(dz, 5)  # gives the scales
    found = gemms.prepare_activated_grad_output(dy, projected, "swiglu", 5)
    expected = gemms.prepare_grad_output(dz, 5)
    assert torch.equal(found.row.view(torch.uint8), expected.row.view(torch.uint8))
    assert torch.equal(found.along_tokens.dense(), expected.along_tokens.dense())


@pytest.mark.parametrize("name", ["fst", "ste"])
@pytest.mark.parametrize("dense", [False, True])
def test_what_was_measured_to_be_faster_computes_it(device, name, dense):
    """A shape is asked for once; the weight gradient stays with what was drawn."""
    needs_transformer_engine(device)
    recipe, chosen, asked = make_recipe(name), Choice(0, 2.0, 1.0), []

    class Chooser:
        def choose(self, key, flops, sparse, by_dense):
            assert error(sparse(0), by_dense()) < 6e-3
            asked.append((key, flops))
            return chosen if dense else Choice(0, 1.0, 2.0)

    gemms = PackedFp8Gemms(recipe, (ShardSlice(0, 0, N),), quantizers(device), chooser=Chooser())
    for step in range(2):
        x, w, dz = (t / (step + 1) for t in operands(device))
        mask = (transposable24_mask if recipe.transposable else prune24_mask)(w)
        gemms.refill(w, Projected(mask))  # dense copies of the step before are of this one then
        z, saved = gemms.output_and_saved(x)
        assert error(z, x.double() @ (w * mask).double().t()) < FP8_ERROR
        found = gemms.prepare_grad_output(dz, 5)
        assert error(gemms.grad_input(found), dz.double() @ (w * mask).double()) < FP8_ERROR
        drawn = mvue24(dz.float(), seed=5, dim=0) if recipe.mvue != "off" else dz
        assert error(gemms.grad_weight(found, saved), drawn.double().t() @ x.double()) < FP8_ERROR
    sparse = {"grad_weight"} if dense else {"output", "grad_input", "grad_weight"}
    assert gemms.ran_sparse == sparse & set(recipe.sparse_gemms)
    assert [flops for _, flops in asked] == [2 * N * K * 256] * len(recipe.sparse_gemms)
    assert len({key for key, _ in asked}) == len(asked)
