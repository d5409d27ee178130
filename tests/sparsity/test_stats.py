"""What is reported of layers: sums by hand, and the ratios that totals of ranks give."""

from __future__ import annotations

import contextlib

import pytest
import torch

from megasparse.errors import KernelError, NumericsError
from megasparse.fp8.delayed import DelayedScaling
from megasparse.sparsity.dense_weight import DenseFp8Weight
from megasparse.sparsity.gemms.dense_fp8 import OperandQuantizers
from megasparse.sparsity.own_decay import OwnDecay
from megasparse.sparsity.probe import NOTHING
from megasparse.sparsity.projection import double_pruned
from megasparse.sparsity.recipe import make_recipe
from megasparse.sparsity.shard import WeightShard
from megasparse.sparsity.state import SparseWeight
from megasparse.sparsity.stats import (
    MAXIMA,
    STEP_SUMS,
    WEIGHT_SUMS,
    Measured,
    layer_figures,
    measure,
)

CPU = torch.device("cpu")


def pruned(recipe, refreshes=2, experts=None, **more):
    """A weight after some steps, with its parameter."""
    state = SparseWeight("w", make_recipe(recipe, **more), WeightShard((8, 12)), experts=experts)
    weight = torch.nn.Parameter(torch.randn(8, 12, generator=torch.Generator().manual_seed(1)))
    for step in range(refreshes):
        with torch.no_grad():
            weight.add_(torch.randn(8, 12, generator=torch.Generator().manual_seed(step)))
        state.gemms(weight, step, True, True)
    return state, weight


def sums(state, weight, sparse=True, dense=()):
    found = measure([(state, weight)], sparse, CPU, list(dense))
    return found, dict(zip(WEIGHT_SUMS, found.weight_sums[0].tolist(), strict=True))


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("recipe", ["fst", "s_ste", "s_ste_3"])
def test_sums_of_a_weight(recipe, sparse):
    state, weight = pruned(recipe, mask_update_interval=1)
    w = weight.detach()
    used = state.effective(w) if sparse else w
    found, of = sums(state, weight, sparse)
    assert found.names == ["w"] and found.flips_known == [True] and int(state.flips) > 0
    assert of["flips"] == float(state.flips) and of["numel"] == 96
    assert of["nonzeros"] == int(used.count_nonzero())
    assert of["kept"] == pytest.approx(float((w * state.mask).abs().sum()), rel=1e-6)
    assert of["magnitude"] == pytest.approx(float(w.abs().sum()), rel=1e-6)
    lost = used - double_pruned(used)
    again = recipe == "s_ste_3" and sparse
    for name, tensor in (("square", used), ("square_lost", lost)):
        expected = float(tensor.double().square().sum()) if again else 0.0
        assert of[name] == pytest.approx(expected, rel=1e-5)
    assert of["nan"] == of["not_24"] == 0
    maxima = dict(zip(MAXIMA, found.maxima[0].tolist(), strict=True))
    assert maxima["scale"] == (NOTHING if recipe == "fst" else pytest.approx(float(state.scale)))
    assert maxima["masked_decay"] == maxima["x"] == NOTHING


def test_a_weight_without_a_mask_yet_is_dense():
    state, weight = pruned("fst", 0)
    found, of = sums(state, weight)
    assert found.flips_known == [False] and of["flips"] == of["kept"] == 0
    assert of["nonzeros"] == 96 == of["numel"]
    soft, weight = pruned("s_ste", 1, mask_update_interval=1)
    soft.mask = None
    _, of = sums(soft, weight)
    assert of["nonzeros"] == 48 and of["kept"] == 0


def test_own_decays_and_scales_of_experts():
    state, weight = pruned("s_ste", 1, experts=2)
    state.decay = OwnDecay(CPU)
    state.decay.value.fill_(0.25)
    for sparse, decay in ((True, 0.25), (False, NOTHING)):
        found, _ = sums(state, weight, sparse)
        assert found.maxima[0, :2].tolist() == [float(state.scale.max()), decay]


def test_dense_layers_come_last_and_what_is_whole_is_asked_for():
    scaling = DelayedScaling(CPU)
    slots = OperandQuantizers.of(scaling)
    scaling.allocate()
    one, entered = DenseFp8Weight("d", slots), []
    one.probe.ask()
    other = torch.nn.Parameter(torch.randn(128, 128).bfloat16())
    one.gemms(other, 0)
    state, weight = pruned("ste")
    found = measure(
        [(state, weight)],
        True,
        CPU,
        [(one, other)],
        lambda parameters: (entered.append(parameters), contextlib.nullcontext())[1],
    )
    assert found.names == ["w", "d"] and found.flips_known == [True, False]
    assert len(entered) == 1 and entered[0][0] is weight
    assert not found.weight_sums[1].any()
    step = dict(zip(STEP_SUMS, found.step_sums[1].tolist(), strict=True))
    assert step["fp8_weight_all"] == 128 * 128 and step["mvue_before"] == 0
    largest = dict(zip(MAXIMA, found.maxima[1].tolist(), strict=True))
    assert largest["weight"] == float(other.abs().max()) and largest["scale"] == NOTHING
    empty = measure([], True, CPU, [])
    shapes = [tuple(t.shape) for t in (empty.weight_sums, empty.step_sums, empty.maxima)]
    assert shapes == [(0, len(WEIGHT_SUMS)), (0, len(STEP_SUMS)), (0, len(MAXIMA))]


def figures(weight=(), step=(), maxima=(), flips_known=True):
    nothing = torch.empty(0)
    measured = Measured(["w"], [flips_known], nothing, nothing, nothing)
    rows = [
        [dict(given).get(name, default) for name in names]
        for given, names, default in (
            (weight, WEIGHT_SUMS, 0.0),
            (step, STEP_SUMS, 0.0),
            (maxima, MAXIMA, NOTHING),
        )
    ]
    return layer_figures(measured, *([row] for row in rows))["w"]


def test_ratios_are_of_totals():
    weight = {
        "flips": 3,
        "nonzeros": 48,
        "numel": 96,
        "kept": 6,
        "magnitude": 8,
        "square": 50,
        "square_lost": 2,
    }
    step = {
        "mvue_before": 4,
        "mvue_after": 10,
        "mvue_variance": 6,
        "decay": 9,
        "gradient": 100,
        "fp8_x_all": 200,
        "fp8_x_largest": 2,
        "fp8_x_lost": 5,
    }
    assert figures(weight.items(), step.items(), {"scale": 0.5, "x": 7.0}.items()) == {
        "density": 0.5,
        "flip_rate": 3 / 96,
        "retained_l1": 0.75,
        "double_pruned": 0.04,
        "decay_ratio": 0.3,
        "mvue_amplification": 2.5,
        "mvue_variance": 1.5,
        "fp8_saturated_x": 0.01,
        "fp8_lost_x": 0.025,
        "fp8_amax_x": 7.0,
        "scale": 0.5,
    }
    assert figures(weight.items(), flips_known=False).keys() == {
        "density",
        "retained_l1",
        "double_pruned",
    }
    for one in ("kept", "magnitude"):
        assert "retained_l1" not in figures({**weight, one: 0}.items())
    for one in ("decay", "gradient"):
        assert "decay_ratio" not in figures(weight.items(), {**step, one: 0}.items())
    assert figures(flips_known=False) == {}


def test_defects_end_the_run():
    with pytest.raises(NumericsError, match="NaN in the weight w"):
        figures({"nan": 1}.items())
    with pytest.raises(KernelError, match="packed for w was not 2:4"):
        figures({"not_24": 1}.items())
