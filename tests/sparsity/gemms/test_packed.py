"""Sparse tensor-core GEMMs against the reference GEMMs with the same operands and draws."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch

from megasparse.kernels import prune24_mask, transposable24_mask
from megasparse.sparsity.gemms.choice import Choice, GemmChooser
from megasparse.sparsity.gemms.dense import ReferenceSparseGemms
from megasparse.sparsity.gemms.packed import PackedSparseGemms, refusal
from megasparse.sparsity.probe import Probe
from megasparse.sparsity.projection import Projected, double_pruned
from megasparse.sparsity.recipe import make_recipe
from megasparse.sparsity.shard import ShardSlice, TokenShare, WeightShard
from megasparse.sparsity.state import SparseWeight
from tests.sparsity.gemms.made import reference_sparse


def test_refusals_name_the_reason():
    recipe = make_recipe("fst")
    weight = torch.zeros(64, 64, dtype=torch.bfloat16)
    assert refusal(weight, recipe, (ShardSlice(0, 0, 64),)) == "the weight is on cpu"


@pytest.mark.parametrize(
    ("dtype", "shape", "parts", "words"),
    [
        (torch.float32, (64, 64), (64,), "the weight is torch.float32, expected 16 bits"),
        (torch.bfloat16, (64, 96), (64,), r"\(64, 96\), expected multiples of 64"),
        (torch.float16, (192, 64), (96, 96), r"\(192, 64\), expected multiples of 64"),
        (torch.float16, (192, 64), (64, 128), None),
    ],
)
def test_what_a_gpu_would_refuse(dtype, shape, parts, words):
    weight = SimpleNamespace(is_cuda=True, dtype=dtype, shape=shape)
    channels = tuple(ShardSlice(0, 0, length) for length in parts)
    found = refusal(weight, make_recipe("fst"), channels)
    assert found is None if words is None else re.search(words, found)
    simulated = refusal(weight, make_recipe("fst", simulate_fp8=True), channels)
    assert "simulate_fp8" in simulated or words is not None


class Chosen:
    """A chooser that measures nothing, and notes what it was asked."""

    def __init__(self, choice):
        self.choice, self.asked = choice, []

    def choose(self, key, flops, sparse, dense):
        _near(sparse(0), dense())
        self.asked.append((key, flops))
        return self.choice


def _near(found, expected):
    assert float((found.double() - expected.double()).norm() / expected.double().norm()) < 6e-3


@pytest.mark.parametrize("name", ["fst", "ste", "s_ste_3"])
@pytest.mark.parametrize("dense", [False, True])
def test_what_was_measured_to_be_faster_computes_it(device, name, dense):
    """A shape is asked for once, and the weight gradient is never drawn otherwise."""
    recipe, n, k = make_recipe(name), 128, 64
    chooser = Chosen(Choice(0, 2.0, 1.0) if dense else Choice(0, 1.0, 2.0))
    w = torch.randn(n, k, device=device).bfloat16()
    probe = Probe()
    probe.ask()
    gemms = PackedSparseGemms(recipe, (ShardSlice(0, 0, n),), probe, chooser)
    state = SparseWeight("w", recipe, WeightShard((n, k)))
    state.refresh(w) if recipe.has_mask else None
    gemms.refill(w, state.project(w))
    bias = torch.arange(n, device=device).bfloat16()
    reference = ReferenceSparseGemms(recipe, (ShardSlice(0, 0, n),))
    reference.refill(w, state.project(w))
    for tokens in (64, 100, 64):
        x, dz = (torch.randn(tokens, size, device=device).bfloat16() for size in (k, n))
        _near(gemms.output(x, bias), reference.output(x, bias))
        ours = gemms.prepare_grad_output(dz, 3)
        dx, dw = gemms.grad_input(ours), gemms.grad_weight(ours, (x,))
        if name != "s_ste_3":  # which prunes along N what was rounded before
            _near(dx, reference.grad_input(ours))
        _near(dw, reference.grad_weight(ours, (x,)))
    sparse = {"grad_weight"} if dense else {"output", "grad_input", "grad_weight"}
    assert gemms.ran_sparse == sparse & set(recipe.sparse_gemms)
    flops = [2 * n * k * 64] * len(recipe.sparse_gemms) + [2 * n * k * 100] * (
        len(recipe.sparse_gemms) - (recipe.mvue != "off")
    )
    whole = [2 * n * k * 128] if recipe.mvue != "off" else []  # draws are of whole tiles
    assert sorted(f for _, f in chooser.asked) == sorted(flops + whole)
    assert len({key for key, _ in chooser.asked}) == len(chooser.asked)
    assert ("mvue_before" in probe.sums) == (recipe.mvue != "off")


def test_draws_are_by_the_tokens_of_this_rank(device):
    """Of context parallelism, in chunks that are no whole tiles."""
    recipe, share, channels = make_recipe("fst"), TokenShare(1, 2), (ShardSlice(0, 0, 64),)
    w, dz = (torch.randn(n, 64, device=device).bfloat16() for n in (64, 96))
    mask, eye = transposable24_mask(w), torch.eye(96, device=device).bfloat16()
    chooser = GemmChooser(None)
    found = []
    for gemms in (
        PackedSparseGemms(recipe, channels, chooser=chooser, tokens=share),
        ReferenceSparseGemms(recipe, channels, tokens=share),
    ):
        gemms.refill(w, Projected(mask))
        found.append(gemms.grad_weight(gemms.prepare_grad_output(dz, 3), (eye,)))
    _near(*found)


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


@pytest.mark.parametrize("kind", ["row", "double-pruned", "transposable"])
@pytest.mark.parametrize("mvue", ["off", "exact", "approximate"])
@pytest.mark.parametrize("tokens", [64, 1000])
def test_equal_to_the_reference(device, kind, mvue, tokens):
    """On a CPU by the packed layout's definition."""
    n, k = 256, 384
    if device.type == "cpu":
        k, tokens = 64, min(tokens, 70)
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
