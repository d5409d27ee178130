"""Packed GEMMs of experts against the reference; on a CPU by the packed layout's definition."""

from __future__ import annotations

import pytest
import torch

from megasparse.kernels import (
    pack24,
    prune24_mask,
    s_ste_scale,
    soft_threshold24,
    transposable24_mask,
    weight_pack24,
)
from megasparse.sparsity.gemms import packed_experts
from megasparse.sparsity.gemms.choice import GemmChooser
from megasparse.sparsity.gemms.experts import Arrivals, DenseExpertGemms, ReferenceExpertGemms
from megasparse.sparsity.gemms.packed_experts import PackedExpertGemms, by_expert, refusal
from megasparse.sparsity.projection import Projected
from megasparse.sparsity.recipe import make_recipe
from megasparse.sparsity.shard import ShardSlice

E, N, K = 3, 128, 64
COUNTS = [70, 0, 129]
CHANNELS = (ShardSlice(0, 0, N),)


def _close(found: torch.Tensor, expected: torch.Tensor) -> None:
    error = (found.double() - expected.double()).norm() / expected.double().norm()
    assert float(error) < 6e-3, float(error)  # bfloat16 rounding of the results


def _arrivals(device: torch.device) -> Arrivals:
    generator = torch.Generator().manual_seed(2)
    places = torch.cat([torch.randperm(400, generator=generator)[:n].sort()[0] for n in COUNTS])
    return Arrivals(COUNTS, places.to(device), 200, 3, 8)


@pytest.mark.parametrize("name", ["ste", "fst", "s_ste", "s_ste_3"])
def test_equal_to_the_reference(device, name):
    torch.manual_seed(1)
    w = torch.randn(E * N, K, device=device).bfloat16()
    recipe = make_recipe(name)
    search = transposable24_mask if recipe.transposable else prune24_mask
    soft = recipe.projection == "soft_threshold"
    projected = Projected(
        None if soft else search(w),
        s_ste_scale(w, experts=E) if soft else None,
        *(torch.zeros(1, dtype=torch.int32, device=device) for _ in range(2)),
    )
    packed = PackedExpertGemms(E, recipe, CHANNELS, chooser=GemmChooser(None))
    reference = ReferenceExpertGemms(E, recipe, CHANNELS)
    for _ in range(2):  # the second time in place
        packed.refill(w, projected)
    reference.refill(w, projected)
    arrivals = _arrivals(device)
    x = torch.randn(sum(COUNTS), K, device=device).bfloat16()
    dz = torch.randn(sum(COUNTS), N, device=device).bfloat16()
    _close(packed.output(x, arrivals), reference.output(x, arrivals))
    _close(packed.grad_input(dz, arrivals), reference.grad_input(dz, arrivals))
    found = packed.grad_weight(dz, x, arrivals, 7)
    _close(found, reference.grad_weight(dz, x, arrivals, 7))
    assert not found.view(E, N, K)[1].any()
    assert not projected.error_flag.any()
    sparse = {"output"} | ({"grad_weight"} if recipe.mvue != "off" else set())
    assert packed.ran_sparse == sparse | ({"grad_input"} if recipe.packed_transpose else set())


@pytest.mark.parametrize("dim", [0, 1])
def test_an_experts_operand_is_what_packing_it_alone_gives(dim):
    """Of the stacked weight, and of its transpose."""
    torch.manual_seed(3)
    w = torch.randn(E * N, K).bfloat16()
    mask = transposable24_mask(w)
    whole = weight_pack24(w, mask, transposed="packed")[dim]
    again = by_expert(whole, E, dim, by_expert(whole, E, dim, []))
    for n, packed in enumerate(again):
        own = (w * mask).view(E, N, K)[n]
        alone = pack24((own if dim == 0 else own.t()).contiguous())
        assert packed.shape == alone.shape and packed.in_one_buffer
        assert torch.equal(packed.values, alone.values)
        assert torch.equal(packed.metadata, alone.metadata)
        assert torch.equal(packed.buffer, alone.buffer)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_scale_for_each_stacked_weight(device, backend):
    w = torch.randn(E * 64, 64, device=device).bfloat16()
    beta = torch.tensor([1.0, 0.5, 3.0], device=device)
    packed, _ = weight_pack24(
        w, threshold_scale=beta, transposed=None, dtype=torch.bfloat16, backend=backend
    )
    for n, part in enumerate(packed.dense().split(64)):
        expected = soft_threshold24(w.split(64)[n]).float() * beta[n]
        assert torch.equal(part, expected.bfloat16())


def test_the_pruned_weight_is_made_once_a_step(monkeypatch):
    made = []
    compute = packed_experts.effective
    monkeypatch.setattr(packed_experts, "effective", lambda *a: made.append(1) or compute(*a))
    w = torch.randn(E * N, K).bfloat16()
    gemms = PackedExpertGemms(E, make_recipe("ste"), CHANNELS, chooser=GemmChooser(None))
    for step in (1, 2):
        w.mul_(step)
        gemms.refill(w, Projected(prune24_mask(w), None))
        first, second = gemms._weights(), gemms._weights()
        assert len(made) == step and first.data_ptr() == second.data_ptr()
        assert torch.equal(first.reshape(w.shape), w * prune24_mask(w))


def test_refusals():
    weight = torch.zeros(2 * 96, 64)
    assert "an expert's shard is (96, 64)" in refusal(weight, 2, (ShardSlice(0, 0, 96),), None)
    assert refusal(weight, 3, (ShardSlice(0, 0, 64),), "no GPU") == "no GPU"
    assert refusal(weight, 3, (ShardSlice(0, 0, 64),), None) is None


@pytest.mark.gpu
def test_grouped_gemms_are_those_one_after_the_other(device):
    w = torch.randn(E * N, K, device=device).bfloat16()
    x = torch.randn(sum(COUNTS), K, device=device).bfloat16()
    dz = torch.randn(sum(COUNTS), N, device=device).bfloat16()
    arrivals = _arrivals(device)
    one, all_ = DenseExpertGemms(E, False, w), DenseExpertGemms(E, True, w)
    _close(all_.output(x, arrivals), one.output(x, arrivals))
    _close(all_.grad_input(dz, arrivals), one.grad_input(dz, arrivals))
    found = all_.grad_weight(dz, x, arrivals, 0)
    _close(found, one.grad_weight(dz, x, arrivals, 0))
    assert not found.view(E, N, K)[1].any()
