"""GEMMs with operands that cuSPARSELt packs itself, against the definition."""

from __future__ import annotations

import pytest
import torch

from megasparse.errors import ConfigError, KernelError
from megasparse.kernels import matmul24, pack24, prune24_mask, spmm24, transposable24_mask
from megasparse.kernels.spmm24.cusparselt_packing import pack24_by_library
from megasparse.sparsity.gemms.choice import Choice
from megasparse.sparsity.gemms.cusparselt_packed import LibrarySparseGemms
from megasparse.sparsity.gemms.dense import ReferenceSparseGemms
from megasparse.sparsity.projection import Projected
from megasparse.sparsity.recipe import make_recipe
from megasparse.sparsity.shard import ShardSlice, WeightShard
from megasparse.sparsity.state import SparseWeight


def _near(a: torch.Tensor, b: torch.Tensor) -> None:
    assert float((a.double() - b.double()).norm() / b.double().norm()) < 4e-3


def test_products_are_those_of_our_packing(device):
    for dtype in (torch.bfloat16, torch.float16):
        w = torch.randn(64, 128, device=device).to(dtype)
        w = torch.where(prune24_mask(w), w, torch.zeros_like(w))
        x, b = torch.randn(40, 128, device=device).to(dtype), torch.randn(128, 96, device=device)
        ours, theirs = pack24(w), pack24_by_library(w)
        assert torch.equal(theirs.dense(), w)
        _near(spmm24(theirs, x), spmm24(ours, x))
        _near(matmul24(theirs, b.to(dtype)), matmul24(ours, b.to(dtype)))
    with pytest.raises(KernelError, match=r"w is torch\.float32 of shape"):
        pack24_by_library(w.float())
    with pytest.raises(KernelError, match="expected a contiguous matrix"):
        pack24_by_library(w.t())


@pytest.mark.parametrize("name", ["fst", "ste", "s_ste", "s_ste_3"])
@pytest.mark.parametrize("tokens", [96, 128])
def test_against_the_definition(device, name, tokens):
    recipe, channels = make_recipe(name), (ShardSlice(0, 0, 128),)
    flag = torch.zeros(1, dtype=torch.int32, device=device)
    library = LibrarySparseGemms(recipe, channels)
    for step in range(2):  # the second is packed where the first was
        generator = torch.Generator().manual_seed(step)
        w, x, dz = (
            torch.randn(size, generator=generator).bfloat16().to(device)
            for size in ((128, 192), (tokens, 192), (tokens, 128))
        )
        mask = (transposable24_mask if recipe.transposable else prune24_mask)(w)
        soft = recipe.projection == "soft_threshold"
        beta = torch.tensor(1.1, device=device) if soft else None
        projected = Projected(None if soft else mask, beta, error_flag=flag)
        library.refill(w, projected)
        reference = ReferenceSparseGemms(recipe, channels)
        reference.refill(w, projected)
        _near(library.output(x), reference.output(x))
        operands = reference.prepare_grad_output(dz, 7)
        _near(library.grad_input(operands), reference.grad_input(operands))
        _near(library.grad_weight(operands, (x,)), reference.grad_weight(operands, (x,)))
    expected = {"output"} | ({"grad_input"} if name in ("fst", "s_ste_3") else set())
    assert library.ran_sparse == expected | (
        {"grad_weight"} if recipe.mvue != "off" and tokens == 128 else set()
    )


@pytest.mark.parametrize("dense", [False, True])
def test_what_was_measured_to_be_faster_computes_it(device, dense):
    """Each shape is asked for once; a draw is packed, or multiplied as it is."""
    recipe, channels, asked = make_recipe("fst"), (ShardSlice(0, 0, 128),), []

    class Chooser:
        def choose(self, key, flops, sparse, by_dense):
            _near(sparse(0), by_dense())
            asked.append((key, flops))
            return Choice(0, 2.0, 1.0) if dense else Choice(0, 1.0, 2.0)

    w, x, dz = (
        torch.randn(s, device=device).bfloat16() for s in ((128, 192), (64, 192), (64, 128))
    )
    projected = Projected(transposable24_mask(w))
    gemms, reference = (
        LibrarySparseGemms(recipe, channels, chooser=Chooser()),
        ReferenceSparseGemms(recipe, channels),
    )
    for one in (gemms, reference):
        one.refill(w, projected)
    bias = torch.arange(128, device=device).bfloat16()
    for _ in range(2):
        _near(gemms.output(x, bias), reference.output(x, bias))
        operands = reference.prepare_grad_output(dz, 7)
        _near(gemms.grad_input(operands), reference.grad_input(operands))
        _near(gemms.grad_weight(operands, (x,)), reference.grad_weight(operands, (x,)))
    assert gemms.ran_sparse == (set() if dense else {"output", "grad_input", "grad_weight"})
    assert [flops for _, flops in asked] == [2 * 64 * 128 * 192] * 3
    assert len({key for key, _ in asked}) == 3


@pytest.mark.gpu
def test_a_run_can_ask_for_it(device):
    w = torch.randn(128, 192, device=device, dtype=torch.bfloat16)
    for packing, kind in (("auto", "PackedSparseGemms"), ("cusparselt", "LibrarySparseGemms")):
        recipe = make_recipe("fst", operand_packing=packing)
        state = SparseWeight("w", recipe, WeightShard((128, 192)))
        assert type(state.gemms(w, 0, True, True)).__name__ == kind
    with pytest.raises(ConfigError, match="operand_packing 'x', expected auto or cusparselt"):
        make_recipe("fst", operand_packing="x")
