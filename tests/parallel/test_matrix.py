"""Every layout gives the numbers of the single process: samples, masks, losses, step by step."""

from __future__ import annotations

from typing import Any

import pytest

from tests import dist
from tests.parallel.layouts import LAYOUTS, RUNS, STEPS, shape
from tests.parallel.trace import traced

TOLERANCE = 2e-6

_single: dict[tuple[str, ...], list[dict[str, Any]]] = {}


def _run(folder, dataset: str, name: str, world: int, flags: list[str]) -> list[dict[str, Any]]:
    run_dir = folder / name.replace(" ", "-").replace(",", "")
    arguments = [*RUNS[name][0], *flags, "--data-path", dataset, "--run-dir", str(run_dir)]
    return dist.run(traced, world, arguments)[0]


def single(folder, dataset: str, name: str, flags: list[str]) -> list[dict[str, Any]]:
    """The run of one process, with the layout's micro-batches: MVUE's groups lie within them."""
    same = shape(flags)
    if (name, *same) not in _single:
        _single[(name, *same)] = _run(folder, dataset, name, 1, same)
    return _single[(name, *same)]


# Ordered by the number of ranks, so that few pools are alive at once.
CASES = sorted(
    ((name, layout) for name, (_, layouts) in RUNS.items() for layout in layouts),
    key=lambda case: LAYOUTS[case[1]][0],
)


@pytest.mark.parametrize(("name", "layout"), CASES, ids=[f"{n}: {lay}" for n, lay in CASES])
def test_layout_gives_the_numbers_of_one_process(tmp_path, dataset, name, layout):
    world, flags = LAYOUTS[layout]
    expected = single(tmp_path, dataset, name, flags)
    rows = _run(tmp_path / "layout", dataset, name, world, flags)
    assert len(rows) == len(expected) == STEPS
    for row, one in zip(rows, expected, strict=True):
        step = one["step"]
        assert row["samples"] == one["samples"], f"step {step}"
        assert row["masks"] == one["masks"] and one["masks"], f"step {step}"
        assert row["loss"] == pytest.approx(one["loss"], rel=TOLERANCE), f"step {step}"
        assert row["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4), f"step {step}"
        for figure in ("flip_rate", "density", "lr", "masked_decay"):
            assert row.get(figure) == one.get(figure), f"step {step}"
        lost = one.get("double_pruned")  # of GEMMs that multiply double-pruned weights
        assert row.get("double_pruned") == (lost and pytest.approx(lost, rel=1e-4)), f"step {step}"
        assert row["scales"] == pytest.approx(one["scales"], rel=1e-5)
        # Once an optimizer step; stages without a sparse layer have nothing to prepare.
        assert row["preparations"] <= {0, 1} and 1 in row["preparations"], f"step {step}"
        if "valid_loss" in one:
            assert row["valid_loss"] == pytest.approx(one["valid_loss"], rel=TOLERANCE)


@pytest.mark.parametrize("name", RUNS)
def test_the_single_run_is_worth_comparing_with(tmp_path, dataset, name):
    """It learns, masks change, and several samples make a step."""
    rows = single(tmp_path, dataset, name, [])
    assert rows[-1]["loss"] < rows[0]["loss"] * 0.999
    assert rows[0]["masks"] != rows[-1]["masks"] and any(row.get("flip_rate") for row in rows)
    assert all(len(set(row["samples"])) == 8 for row in rows)
    assert [row["step"] for row in rows if "valid_loss" in row] == [3, STEPS]
