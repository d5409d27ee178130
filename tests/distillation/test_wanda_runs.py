"""Masks by the Wanda metric in whole runs: the same in every layout and after a resume."""

from __future__ import annotations

import pytest

from tests import dist
from tests.distillation.runs import AST
from tests.parallel.layouts import FULL, PP2, SP, TP2, zero
from tests.parallel.trace import traced

LAYOUTS = {
    "tp 2, sp, pp 2, full": (4, [*TP2, *SP, *PP2, *FULL]),
    "dp 2, zero 1": (2, zero(1)),
}


def _run(folder, dataset, dense, flags, world=1):
    arguments = [
        *AST,
        "--mask-metric",
        "wanda",
        "--load",
        dense,
        "--data-path",
        dataset,
        "--run-dir",
        str(folder),
        *flags,
    ]
    return dist.run(traced, world, arguments)[0]


@pytest.fixture(scope="module")
def single(tmp_path_factory, dataset, dense):
    return _run(tmp_path_factory.mktemp("single"), dataset, dense, [])


def test_the_first_masks_know_the_inputs_of_the_given_weights(tmp_path, dataset, dense, single):
    """Without a calibration they are magnitude's, and many entries flip at the second refresh."""
    blind = _run(tmp_path / "blind", dataset, dense, ["--calibration-samples", "0"])
    other = _run(tmp_path / "other", dataset, dense, ["--mask-metric", "magnitude"])
    assert blind[0]["masks"] == other[0]["masks"] != single[0]["masks"]
    assert other[4]["masks"] != single[4]["masks"]
    # The training data itself begins with its first sample all the same.
    assert [row["samples"] for row in single] == [row["samples"] for row in other]
    second, before = (rows[4]["flip_rate"] for rows in (single, blind))
    assert second < 0.4 * before and before > 0.05


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_gives_the_masks_of_one_process(tmp_path, dataset, dense, single, layout):
    world, flags = LAYOUTS[layout]
    rows = _run(tmp_path, dataset, dense, flags, world)
    for row, one in zip(rows, single, strict=True):
        assert row["masks"] == one["masks"], one["step"]
        assert row["loss"] == pytest.approx(one["loss"], rel=1e-5), one["step"]


@pytest.mark.parametrize("continues", [(1, []), (2, TP2)], ids=["one", "tp 2"])
def test_a_resume_remembers_the_inputs(tmp_path, dataset, dense, single, continues):
    # Two ranks save, and the next refresh comes after the resume.
    saves = (1, []) if continues[0] == 1 else (2, zero(1))
    _run(tmp_path, dataset, dense, [*saves[1], "--exit-interval", "6"], saves[0])
    rows = _run(tmp_path, dataset, dense, [*continues[1], "--resume"], continues[0])
    assert [row["masks"] for row in rows] == [row["masks"] for row in single[6:]]
    exact = continues[0] == 1
    for row, one in zip(rows, single[6:], strict=True):
        assert row["loss"] == (one["loss"] if exact else pytest.approx(one["loss"], rel=1e-5))
