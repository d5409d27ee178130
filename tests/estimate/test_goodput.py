"""Simulated goodput against closed forms, and the advice that follows from it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from megasparse.estimate.goodput import (
    HOUR,
    Costs,
    best_interval,
    daly,
    exact,
    main,
    mtbf_of,
    simulate,
    young,
)

CASES = [
    Costs(mtbf=3 * HOUR, save=90.0, restart=300.0),
    Costs(mtbf=12 * HOUR, save=30.0, restart=900.0, notice=30.0),
    Costs(mtbf=1000.0, save=60.0, restart=400.0, notice=100.0),
]


@pytest.mark.parametrize("costs", CASES)
@pytest.mark.parametrize("factor", [0.3, 1.0, 4.0])
def test_simulation_and_dalys_formula_agree(costs, factor):
    interval = factor * young(costs)
    found = simulate(costs, interval, 3000 * costs.mtbf, runs=12, seed=1)
    # A run ends at a fixed time, so the share of the last cycle is over by less than a per mille.
    assert found.share == pytest.approx(exact(costs, interval), abs=4 * found.error + 1e-3)
    assert found.error < 0.01


@pytest.mark.parametrize("costs", CASES)
def test_the_best_interval_is_the_best_and_near_youngs_and_dalys(costs):
    best = best_interval(costs)
    shares = [exact(costs, best * factor) for factor in (0.97, 1.0, 1.03)]
    assert max(shares) == shares[1]
    assert best == pytest.approx(daly(costs), rel=0.02)
    assert best == pytest.approx(young(costs), rel=math.sqrt(2 * costs.save / costs.mtbf))


def test_without_failures_or_saves_nothing_is_lost():
    never = Costs(mtbf=1e15, save=30.0, restart=900.0)
    assert exact(never, 270.0) == pytest.approx(0.9)
    assert simulate(never, 270.0, 1e8, runs=2).share == pytest.approx(0.9, abs=1e-4)
    free = Costs(mtbf=HOUR, save=0.0)
    assert exact(free, 1e-3) == pytest.approx(1.0, abs=1e-6)


def test_publication_in_the_background_loses_what_is_not_published():
    """To first order a failure loses half an interval and the time until publication."""
    costs = Costs(mtbf=100 * HOUR, save=1.0, publish=600.0, restart=100.0)
    interval = 1200.0
    found = simulate(costs, interval, 4000 * costs.mtbf, runs=8)
    lost = interval / 2 + costs.publish + costs.restart
    assert 1 - found.share == pytest.approx(1 / interval + lost / costs.mtbf, rel=0.03)
    assert best_interval(costs) >= costs.publish


def test_without_a_host_in_reserve_every_failure_waits_for_a_repair():
    """That is a longer notice, which the formula has; with enough hosts nobody waits."""
    costs = Costs(mtbf=20 * HOUR, save=60.0, restart=300.0, repair=10 * HOUR)
    interval = best_interval(costs)
    duration = 3000 * costs.mtbf
    none = simulate(replace(costs, spare_hosts=0), interval, duration, runs=8)
    waiting = replace(costs, notice=costs.repair)
    assert none.share == pytest.approx(exact(waiting, interval), abs=4 * none.error + 1e-3)
    # Hosts under repair are Poisson distributed, with mean repair / mtbf = 0.5.
    shares = [
        simulate(replace(costs, spare_hosts=n), interval, duration, runs=4).share
        for n in (0, 1, 2, 8)
    ]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(exact(costs, interval), abs=2e-3)


def test_llama_3s_log_is_the_default():
    assert mtbf_of(16_384) == pytest.approx(54 * 24 * HOUR / 419)
    assert mtbf_of(1024) == pytest.approx(16 * mtbf_of(16_384))


def test_the_command_advises_an_interval_and_refuses_what_cannot_be(capsys):
    flags = ["--gpus", "1024", "16384", "--save-seconds", "10", "--restart-seconds", "70"]
    assert main([*flags, "--step-seconds", "5", "--days", "10"]) == 0
    text = capsys.readouterr().out
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in text.splitlines()[4:]]
    assert text.startswith("Simulated: 10 days") and [row[0] for row in rows] == ["1,024", "16,384"]
    for row, gpus in zip(rows, (1024, 16384), strict=True):
        costs = Costs(mtbf_of(gpus), 10.0, restart=70.0, notice=12.0)
        assert int(row[5]) == round(best_interval(costs) / 5)
        assert float(row[6]) == pytest.approx(exact(costs, best_interval(costs)), abs=0.01)
    for wrong in (["--gpus", "0"], ["--save-seconds", "0"], ["--repair-hours", "-1"]):
        assert main([*flags, *wrong]) == 64
        assert f"{wrong[0]}: found {wrong[1]}, expected a number" in capsys.readouterr().err
