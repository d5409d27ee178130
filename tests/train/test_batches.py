"""Runs whose batch grows, and whose length is in samples."""

from __future__ import annotations

import pytest

from tests import dist
from tests.runs import TINY, train

# Batches of 2 until 12 samples are consumed, of 4 until 24, of 6 until 42: 6 + 3 + 3 steps. 3
# samples are left over.
GROWING = [
    *TINY[: TINY.index("--train-iters")], *TINY[TINY.index("--lr") :],
    "--micro-batch-size", "1", "--global-batch-size", "6", "--rampup-batch-size", "2", "2", "24",
    "--train-samples", "45", "--lr-warmup-samples", "10", "--min-lr", "1e-4", "--log-interval", "3",
    "--lr-linear-to-zero-samples", "9", "--eval-iters", "1", "--eval-interval", "4",
]  # fmt: skip
SIZES = [2] * 6 + [4] * 3 + [6] * 3
LOSS = ("step", "loss", "grad_norm", "lr", "consumed_samples", "samples", "valid_loss")


def _run(folder, dataset, *flags, world=1):
    arguments = [*GROWING, *flags, "--data-path", dataset, "--run-dir", str(folder)]
    return dist.run(train, world, arguments)[0]


def _exact(rows):
    return [{key: row.get(key) for key in LOSS} for row in rows]


@pytest.fixture(scope="module")
def rows(tmp_path_factory, dataset):
    return _run(tmp_path_factory.mktemp("whole"), dataset)


def test_the_run_ends_with_its_samples(rows):
    assert [row["global_batch_size"] for row in rows] == SIZES
    assert [row["consumed_samples"] for row in rows] == [sum(SIZES[: n + 1]) for n in range(12)]
    before = [0, *(row["consumed_samples"] for row in rows)]
    for row, done in zip(rows, before, strict=False):
        if done < 10:
            assert row["lr"] == pytest.approx(1e-3 * min(done + row["global_batch_size"], 10) / 10)
        if done >= 36:
            assert row["lr"] == pytest.approx(1e-4 * (45 - done) / 9)


def test_a_resume_repeats_it(tmp_path, dataset, rows):
    first = _run(tmp_path, dataset, "--exit-interval", "7")  # the first step of 4 is done
    assert len(first) == 7
    assert _exact(_run(tmp_path, dataset, "--resume")) == _exact(rows)


def test_each_size_is_a_run_of_that_batch(tmp_path, dataset, rows):
    """Step by step against runs that know nothing of a ramp-up."""
    plain = ["--rampup-batch-size", "none", "--eval-interval", "none"]
    for size, stop in ((2, 6), (4, 9), (6, 12)):
        flags = ["--global-batch-size", str(size), "--exit-interval", str(stop)]
        more = ["--resume", "--override-batch"] if size > 2 else []
        found = _run(tmp_path, dataset, *plain, *flags, *more)
    assert len(found) == 12  # the last run has found how many batches of 6 are left
    keys = LOSS[:-1]
    for row, expected in zip(found, rows, strict=True):
        assert {k: row[k] for k in keys} == {k: expected[k] for k in keys}


@pytest.mark.parametrize(
    "layout",
    [
        ["--zero-stage", "1"],
        ["--zero-stage", "2"],
        ["--zero-stage", "3"],
        ["--pipeline-model-parallel-size", "2", "--zero-stage", "1"],
    ],
    ids=lambda flags: " ".join(flags).replace("--", ""),
)
def test_in_every_layout(tmp_path, dataset, rows, layout):
    split = _run(tmp_path, dataset, *layout, world=2)
    assert [row["samples"] for row in split] == [row["samples"] for row in rows]
    for row, expected in zip(split, rows, strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=2e-6)
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
        assert row["lr"] == expected["lr"]
        if expected.get("valid_loss"):
            assert row["valid_loss"] == pytest.approx(expected["valid_loss"], rel=2e-6)
