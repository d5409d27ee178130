"""Sparse tensor-core GEMMs against the reference GEMMs with the same operands and draws."""

from __future__ import annotations

import pytest
import torch

from megasparse.kernels import prune24_mask, transposable24_mask
from megasparse.sparsity.gemms.choice import GemmChooser
from megasparse.sparsity.gemms.packed import PackedSparseGemms, refusal
from megasparse.sparsity.projection import Projected, double_pruned
from megasparse.sparsity.recipe import make_recipe
from megasparse.sparsity.shard import ShardSlice, WeightShard
from megasparse.sparsity.state import SparseWeight
from tests.sparsity.gemms.made import reference_sparse


def test_refusals_name_the_reason():
    recipe = make_recipe("fst")
    weight = torch.zeros(64, 64, dtype=torch.bfloat16)
    assert refusal(weight, recipe, (ShardSlice(0, 0, 64),)) == "the weight is on cpu"


@pytest.mark.gpu
def test_refusals_on_a_gpu(device):
    recipe = make_recipe("fst")
    whole = (ShardSlice(0, 0, 64),)
    weight = torch.zeros(64, 64, device=device).bfloat16()
    assert "float32" in refusal(weight.float(), recipe, whole)
    assert "multiples of 64" in refusal(weight[:32], recipe, (ShardSlice(0, 0, 32),))
    halves = (ShardSlice(0, 0, 32), ShardSlice(32, 0, 32))
    assert "multiples of 64" in refusal(weight, recipe, halves)
    assert "simulate_fp8" in refusal(weight, make_recipe("s_ste", simulate_fp8=True), whole)
    assert refusal(weight, recipe, whole) is None


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["row", "double-pruned", "transposable"])
@pytest.mark.parametrize("mvue", ["off", "exact", "approximate"])
@pytest.mark.parametrize("tokens", [64, 1000])
def test_equal_to_the_reference(device, kind, mvue, tokens):
    n, k = 256, 384
    w = torch.randn(n, k, device=device, dtype=torch.bfloat16)
    mask = transposable24_mask(w) if kind == "transposable" else prune24_mask(w)
    effective = torch.where(mask, w, torch.zeros((), device=device, dtype=w.dtype))
    channels = (ShardSlice(0, 0, 128), ShardSlice(128, 512, 128))
    flag = torch.zeros(1, dtype=torch.int32, device=device)
    recipe = make_recipe("fst" if kind == "transposable" else "ste", mvue=mvue)
    if kind == "double-pruned":
        recipe = make_recipe("ste", mvue=mvue, sparse_grad_input=kind)
    packed = PackedSparseGemms(recipe, channels, chooser=GemmChooser(None))
    packed.refill(w, Projected(mask, error_flag=flag))
    reference = reference_sparse(effective.double(), mvue, channels)
    x = torch.randn(tokens, k, device=device, dtype=torch.bfloat16)
    dz = torch.randn(tokens, n, device=device, dtype=torch.bfloat16)

    def close(a, b):
        error = (a.double() - b).norm() / b.norm()
        assert float(error) < 4e-3, float(error)  # bfloat16 rounding of the output

    close(packed.output(x), reference.output(x.double()))
    again = double_pruned(effective) if kind == "double-pruned" else effective
    close(packed.grad_input(packed.prepare_grad_output(dz, 7)), dz.double() @ again.double())
    assert ("grad_input" in packed.ran_sparse) == (kind != "row")
    # The draws depend on bfloat16 gradients, so the reference prunes those before it widens them.
    pruned = reference._prune_along_tokens(dz, 7) if mvue != "off" else dz
    close(
        packed.grad_weight(packed.prepare_grad_output(dz, 7), (x,)),
        pruned.double().t() @ x.double(),
    )
    assert int(flag) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["fst", "ste", "s_ste", "s_ste_3"])
def test_a_state_packs_its_weight_once(device, name):
    """What the state of a weight gives on a GPU, against the same on the CPU."""
    w = torch.randn(128, 192, generator=torch.Generator().manual_seed(3)).bfloat16()
    x = torch.randn(96, 192, generator=torch.Generator().manual_seed(4)).bfloat16()
    found = {}
    for where in ("cpu", device):
        state = SparseWeight("w", make_recipe(name), WeightShard((128, 192)))
        gemms = state.gemms(w.to(where), 0, True, True)
        found[str(where)] = gemms.output(x.to(where)).cpu().double()
        assert not state.flags(w.to(where).device).any()
    assert isinstance(gemms, PackedSparseGemms)
    on_gpu, on_cpu = found[str(device)], found["cpu"]
    assert float((on_gpu - on_cpu).norm() / on_cpu.norm()) < 4e-3


@pytest.mark.gpu
def test_a_mask_that_is_not_24_is_flagged(device):
    w = torch.randn(64, 64, device=device, dtype=torch.bfloat16)
    state = SparseWeight("w", make_recipe("ste"), WeightShard((64, 64)))
    state.gemms(w, 0, True, True)
    state.mask = torch.ones_like(w, dtype=torch.bool)
    state.invalidate()  # the mask of step 0 is not searched again
    state.gemms(w, 0, True, True)
    assert state.flags(w.device).tolist() == [0.0, 1.0]


@pytest.mark.gpu
def test_large_shapes_are_tuned_once_and_remembered(device, tmp_path):
    path = tmp_path / "gemms.json"
    w = torch.randn(1024, 1024, device=device, dtype=torch.bfloat16)
    w = torch.where(transposable24_mask(w), w, torch.zeros((), device=device, dtype=w.dtype))
    x = torch.randn(2048, 1024, device=device, dtype=torch.bfloat16)
    flag = torch.zeros(1, dtype=torch.int32, device=device)
    channels = (ShardSlice(0, 0, 1024),)
    for _ in range(2):
        chooser = GemmChooser(path)
        gemms = PackedSparseGemms(make_recipe("ste"), channels, chooser=chooser)
        gemms.refill(w, Projected(w != 0, error_flag=flag))
        z = gemms.output(x)
        assert float((z.double() - x.double() @ w.double().t()).norm() / z.double().norm()) < 4e-3
        (key,) = GemmChooser(path)._choices
        assert key == "T 2048, N 1024, K 1024, torch.bfloat16"
