"""What a probe keeps: sums over micro-batches at addresses that stay, and nothing unasked."""

from __future__ import annotations

import pytest
import torch

from megasparse.kernels import mvue24, mvue24_variance
from megasparse.sparsity.probe import NOTHING, Probe
from megasparse.sparsity.recipe import make_recipe

DZ = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))


def told(probe, times=1, recipe="fst", **more):
    for _ in range(times):
        probe.mvue(DZ, mvue24(DZ, seed=1, dim=0), make_recipe(recipe, **more))
        probe.decay(DZ, DZ.clamp(min=0), 0.5)
        probe.fp8("x", DZ * 2, (DZ * 200).clamp(-448, 448).round(), torch.float8_e4m3fn)


def test_nothing_is_measured_unasked():
    probe = Probe()
    told(probe)
    assert not (probe.asked or probe.waits or probe.sums or probe.maxima)
    probe.ask()
    assert probe.asked and probe.waits
    told(probe)
    before = {name: float(value) for name, value in probe.sums.items()}
    probe.dismiss()
    told(probe)
    assert before == {name: float(value) for name, value in probe.sums.items()}
    assert not (probe.asked or probe.waits)


@pytest.mark.parametrize("times", [1, 3])
def test_sums_are_of_all_micro_batches_since_it_was_asked(times):
    probe = Probe()
    for _ in range(2):
        probe.ask()
        told(probe, times)
        places = {name: value.data_ptr() for name, value in probe.sums.items()}
        square = DZ.double().square().sum()
        expected = {
            "mvue_before": square,
            "mvue_after": mvue24(DZ, seed=1, dim=0).double().square().sum(),
            "mvue_variance": mvue24_variance(DZ, dim=0, exact=True, strided=False),
            "gradient": square,
            "decay": 0.25 * DZ.clamp(min=0).double().square().sum(),
            "fp8_x_all": DZ.numel(),
            "fp8_x_largest": (DZ.abs() * 200 >= 447.5).sum(),
            "fp8_x_lost": ((DZ * 200).round() == 0).sum(),
        }
        for name, value in expected.items():
            assert float(probe.sums[name]) == pytest.approx(times * float(value), rel=1e-6), name
        assert set(probe.sums) == set(expected)
        assert float(probe.maxima["x"]) == float(DZ.abs().max() * 2)
    assert places == {name: value.data_ptr() for name, value in probe.sums.items()}
    probe.ask()
    assert float(probe.maxima["x"]) == NOTHING and not any(map(float, probe.sums.values()))
    probe.fp8("x", DZ, DZ, torch.float8_e4m3fn)
    probe.fp8("x", DZ / 2, DZ, torch.float8_e4m3fn)
    assert float(probe.maxima["x"]) == float(DZ.abs().max())


@pytest.mark.parametrize(("mvue", "groups"), [("approximate", "neighbours"), ("exact", "strided")])
def test_the_variance_is_that_of_the_recipes_draws(mvue, groups):
    probe = Probe()
    probe.ask()
    told(probe, mvue=mvue, mvue_groups=groups)
    how = {"exact": mvue == "exact", "strided": groups == "strided"}
    expected = float(mvue24_variance(DZ, dim=0, **how))
    assert float(probe.sums["mvue_variance"]) == pytest.approx(expected, rel=1e-9)
    assert expected != float(mvue24_variance(DZ, dim=0, exact=True, strided=False))
