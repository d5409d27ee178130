"""The time of a run that is a schedule of phases."""

from __future__ import annotations

from pathlib import Path

import pytest

from megasparse.config import load_config, resolve
from megasparse.estimate.gemm_table import GemmTable
from megasparse.estimate.phases import describe, mean_seconds, phase_times
from megasparse.estimate.time import step_time
from megasparse.sparsity.run_recipe import recipe_of
from tests.tools.test_estimate import LAYERS

TABLE = GemmTable(Path(__file__).parents[2] / "tools/results/gemm-h200.json")


def _times(*flags):
    config = resolve(load_config([*LAYERS, *flags]), 1)
    recipe = recipe_of(config)
    return phase_times(config, recipe, 32000, 1, TABLE), step_time(config, recipe, 32000, 1, TABLE)


def test_each_phase_takes_the_time_of_its_recipe():
    fst = ["--sparsity-recipe", "fst", "--sparsity-phases"]
    phases, _ = _times(*fst, "dense:0.1,fst:0.5,row+grad-input=double-pruned:0.2,row:0.2")
    dense, three, pruned, two = (phase.time.seconds for phase in phases)
    assert [phase.share for phase in phases] == [0.1, 0.5, 0.2, 0.2]
    assert dense == _times("--sparsity-recipe", "dense")[1].seconds
    assert three == _times("--sparsity-recipe", "fst", "--dense-tail-fraction", "0")[1].seconds
    # Three sparse GEMMs, whatever the masks; with an exact grad_input two.
    assert pruned == pytest.approx(three, rel=0.01) and three < two < dense
    assert mean_seconds(phases) == pytest.approx(
        0.1 * dense + 0.5 * three + 0.2 * pruned + 0.2 * two
    )


def test_the_dense_tail_is_a_phase_and_a_run_of_one_says_nothing():
    phases, sparse = _times("--sparsity-recipe", "fst")
    assert [round(phase.share, 6) for phase in phases] == [round(5 / 6, 6), round(1 / 6, 6)]
    assert phases[0].time == sparse
    lines = describe(phases, 1000)
    assert len(lines) == 5 and " 83.3% of the steps" in lines[2] and lines[3].endswith("dense")
    assert f"{1000 / mean_seconds(phases):,.0f} tokens/s" in lines[4]
    one, _ = _times("--sparsity-recipe", "s_ste_3")
    assert len(one) == 1 and describe(one, 1000) == []


def test_s_ste_3_has_the_gemms_of_fst():
    for flags in ([], ["--fp8-format", "e4m3"]):
        fst = _times("--sparsity-recipe", "fst", "--dense-tail-fraction", "0", *flags)[1].parts
        three = _times("--sparsity-recipe", "s_ste_3", *flags)[1].parts
        two = _times("--sparsity-recipe", "s_ste", *flags)[1].parts
        assert three["GEMMs"] == fst["GEMMs"] < two["GEMMs"]
    assert three["operands"] < two["operands"]  # e4m3: a packed weight is less to write
