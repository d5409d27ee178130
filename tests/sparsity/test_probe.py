"""What a probe keeps: sums over micro-batches at addresses that stay, and nothing unasked."""

from __future__ import annotations

import pytest
import torch

from megasparse.kernels import mvue24, mvue24_variance
from megasparse.sparsity.probe import NOTHING, STEP_SUMS, Probe
from megasparse.sparsity.recipe import make_recipe

DZ = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
E4M3 = torch.float8_e4m3fn
ROUNDED = (DZ * 200).clamp(-448, 448).mul(2.0**-12).to(E4M3)  # most are lost
ROUNDED[0] = 448.0


def told(probe, times=1, recipe="fst", **more):
    for _ in range(times):
        probe.mvue(DZ, mvue24(DZ, seed=1, dim=0), make_recipe(recipe, **more))
        probe.decay(DZ, DZ.clamp(min=0), 0.5)
        probe.fp8("x", DZ * 2, ROUNDED)


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
            "fp8_x_largest": 8,
            "fp8_x_lost": (ROUNDED.float() == 0).sum(),
        }
        for name, value in expected.items():
            assert float(probe.sums[name]) == pytest.approx(times * float(value), rel=1e-6), name
        assert set(probe.sums) == set(expected)
        assert float(probe.maxima["x"]) == float(DZ.abs().max() * 2)
    assert places == {name: value.data_ptr() for name, value in probe.sums.items()}
    probe.ask()
    assert float(probe.maxima["x"]) == NOTHING and not any(map(float, probe.sums.values()))
    probe.fp8("x", DZ, ROUNDED)
    probe.fp8("x", DZ / 2, ROUNDED)
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


def test_a_scaled_draw_is_told_in_8_bits():
    """Its squares are those of what it stands for, and what undoes the scaling is on the device."""
    drawn = mvue24(DZ, seed=1, dim=0)
    stored, told_wide, told_stored = (drawn * 8).to(E4M3), Probe(), Probe()
    for probe in (told_wide, told_stored):
        probe.ask()
    told_wide.mvue(DZ, stored.float() / 8, make_recipe("fst"))
    told_stored.mvue(DZ, stored, make_recipe("fst"), torch.tensor(1 / 8))
    after = [float(probe.sums["mvue_after"]) for probe in (told_wide, told_stored)]
    assert after[0] == after[1] > float(told_wide.sums["mvue_before"])


def test_names_are_views_of_what_is_reported():
    """Of one vector each: a rank hands them over as they are."""
    probe = Probe()
    probe.ask()
    told(probe)
    assert probe.totals is not None and probe.largest is not None
    for name, place in ((name, STEP_SUMS.index(name)) for name in probe.sums):
        assert probe.sums[name].data_ptr() == probe.totals[place].data_ptr()
    not_told = set(STEP_SUMS) - set(probe.sums)
    assert not_told and not any(float(probe.totals[STEP_SUMS.index(n)]) for n in not_told)
    assert probe.largest.tolist() == [float(probe.maxima["x"]), NOTHING, NOTHING, NOTHING]
    probe.fp8("weight", DZ[:0], ROUNDED)  # of experts without tokens
    assert set(probe.maxima) == {"x"}


@pytest.mark.gpu
@pytest.mark.parametrize("mvue", ["exact", "approximate"])
def test_a_captured_step_adds_what_a_cpu_computes(device, mvue):
    """Both replays of a graph add up, as two micro-batches do; repeated the bits are the same."""
    dz = (torch.randn(1000, 512, generator=torch.Generator().manual_seed(3)) * 1e-6).bfloat16()
    stored = (dz.float() * 2**24).clamp(-448, 448).to(E4M3)
    recipe = make_recipe("fst", mvue=mvue)

    def step(probe, where):
        given = dz.to(where), stored.to(where), torch.tensor(2.0**-24).to(where)

        def tell():
            probe.fp8("grad_output", *given[:2])
            probe.mvue(given[0], given[1], recipe, given[2])
            probe.decay(given[0], given[0], 0.25)

        return tell

    slow, fast, found = Probe(), Probe(), []
    slow.ask()
    tell = step(slow, "cpu")
    tell()
    tell()
    fast.ask()
    tell = step(fast, device)
    tell()  # before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tell()
    for _ in range(2):
        fast.ask()
        graph.replay()
        graph.replay()
        found.append(fast.totals.clone())
    assert torch.equal(*found) and float(fast.maxima["grad_output"]) == float(dz.abs().max())
    assert found[0].tolist() == pytest.approx(slow.totals.tolist(), rel=1e-4)
