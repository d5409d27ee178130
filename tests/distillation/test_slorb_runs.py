"""SLoRB in whole runs: layouts, its parameters in checkpoints, a change of the layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megasparse.checkpoint.model import StoredModel
from megasparse.kernels import prune24_mask
from megasparse.sparsity.slorb import fold
from megasparse.train.checkpoint import newest_valid
from tests import dist
from tests.checkpoint.parts import check_parts
from tests.distillation.runs import AST, TEACHER
from tests.parallel.layouts import PP2, SP, TP2, zero
from tests.runs import LLAMA, train

BOOST = ["--slorb-k", "8", "--replica-check-interval", "2", *TEACHER]
LAYOUTS = {
    "tp 2, sp, pp 2, zero 1": (4, [*TP2, *SP, *PP2, *zero(1)]),
    "dp 2, zero 2": (2, zero(2)),
}


def _run(folder, dataset, dense, flags, world=1):
    arguments = [*AST, *BOOST, "--load", dense, "--data-path", dataset, "--run-dir", str(folder)]
    return dist.run(train, world, [*arguments, *flags])[0]


@pytest.fixture(scope="module")
def single(tmp_path_factory, dataset, dense):
    folder = tmp_path_factory.mktemp("single")
    return _run(folder, dataset, dense, []), folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_gives_the_numbers_of_one_process(tmp_path, dataset, dense, single, layout):
    world, flags = LAYOUTS[layout]
    rows = _run(tmp_path, dataset, dense, flags, world)
    for row, one in zip(rows, single[0], strict=True):
        assert row["loss"] == pytest.approx(one["loss"], rel=1e-5), one["step"]
        assert row["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4), one["step"]


@pytest.mark.parametrize(
    ("saves", "continues"),
    [((2, TP2), (1, [])), ((1, zero(1)), (2, TP2))],
    ids=["tp 2 to 1", "zero 1 to tp 2"],
)
def test_another_layout_continues_the_run(tmp_path, dataset, dense, single, saves, continues):
    first = _run(tmp_path, dataset, dense, [*saves[1], "--exit-interval", "6"], saves[0])
    rows = _run(tmp_path, dataset, dense, [*continues[1], "--resume"], continues[0])
    assert len(first) == 6 and len(rows) == 10
    for row, one in zip(rows, single[0], strict=True):
        assert row["loss"] == pytest.approx(one["loss"], rel=1e-5), one["step"]


def test_it_starts_with_the_sums_of_the_dense_weights_and_is_trained(
    tmp_path, dataset, dense, single
):
    # With a rate of nearly nothing the saved weights are those that the run began with.
    flags = ["--train-iters", "1", "--lr", "1e-12", "--weight-decay", "0"]
    _run(tmp_path, dataset, dense, flags)
    start, end = (newest_valid(Path(f) / "checkpoints") for f in (tmp_path, single[1]))
    names = [key for key in start.keys("param/") if key.endswith("slorb_adapter")]
    assert len(names) == 8
    for folded in (True, False):
        check_parts(StoredModel(start, fold=folded), 2, exact=not folded)
    source = newest_valid(Path(dense))
    for key in names:
        layer = key.removesuffix(".slorb_adapter")
        weight = source.read(f"{layer}.weight")
        adapter, projection = start.read(key), start.read(f"{layer}.slorb_projection")
        effective = weight * prune24_mask(weight)
        whole = fold(effective, adapter, projection)
        torch.testing.assert_close(
            *(t.unflatten(1, (-1, 8)).sum(-1) for t in (whole, weight)), rtol=1e-4, atol=1e-5
        )
        for part in (key, f"{layer}.slorb_projection"):
            assert not torch.equal(end.read(part), start.read(part))


def test_sums_over_groups_and_fused_gates(tmp_path, dataset):
    """An untrained projection has no matrix; gate and up are split over ranks apart."""
    flags = [
        *[f for f in AST if f != "--finetune"],
        *LLAMA,
        "--ffn-hidden-size",
        "64",
        "--slorb-k",
        "8",
        "--no-slorb-train-projection",
        "--train-iters",
        "4",
        "--data-path",
        dataset,
    ]
    one = dist.run(train, 1, [*flags, "--run-dir", str(tmp_path / "one")])[0]
    two = dist.run(train, 2, [*flags, *TP2, "--run-dir", str(tmp_path / "two")])[0]
    assert [r["loss"] for r in two] == pytest.approx([r["loss"] for r in one], rel=1e-5)
    keys = newest_valid(tmp_path / "two" / "checkpoints").keys("param/")
    assert sum(key.endswith("slorb_adapter") for key in keys) == 8
    assert not any(key.endswith("slorb_projection") for key in keys)
    check_parts(StoredModel(newest_valid(tmp_path / "two" / "checkpoints")), 2, exact=False)
