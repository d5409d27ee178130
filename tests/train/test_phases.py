"""Dense steps are dense training, whatever the recipe and whatever is measured."""

from __future__ import annotations

import shutil

import pytest
import torch

from megasparse.train.checkpoint import newest_valid
from tests import dist
from tests.runs import TINY, train

# 8 steps: 3 dense ones, 3 of the recipe, 2 dense ones. Masks are due at steps 0 and 4, and at the
# first sparse one, which is 3.
STEPS = ["--train-iters", "8", "--lr", "1e-2", "--weight-decay", "0.1"]
PHASES = ["--dense-warmup-fraction", "0.375", "--dense-tail-fraction", "0.25"]
DENSE = ["--sparsity-recipe", "dense", "--masked-decay", "none", "--dense-tail-fraction", "none"]
RECIPES = {
    "ste": ["--sparsity-recipe", "ste", "--masked-decay", "none"],
    "sr_ste": ["--sparsity-recipe", "sr_ste", "--masked-decay-before-clipping"],
    "fst": ["--sparsity-recipe", "fst"],
    "s_ste": ["--sparsity-recipe", "s_ste", "--masked-decay", "none"],
    "ast": ["--sparsity-recipe", "ast", "--masked-decay-ramp-iters", "2"],
    "ast-wanda": ["--sparsity-recipe", "ast", "--mask-metric", "wanda"],
}
EXACT = ("step", "loss", "grad_norm", "lr")


def _run(folder, dataset, flags):
    arguments = [*TINY, *STEPS, "--data-path", dataset, "--run-dir", str(folder), *flags]
    return dist.run(train, 1, arguments)[0]


def _exact(rows):
    return [{key: row[key] for key in EXACT} for row in rows]


def _weights(folder):
    reader = newest_valid(folder / "checkpoints")
    keys = [key for key in reader.keys("") if key.split("/")[0] in ("param", "optim")]
    return {key: reader.read(key) for key in keys}


@pytest.fixture(scope="module")
def dense(dataset, tmp_path_factory):
    return _run(tmp_path_factory.mktemp("dense"), dataset, DENSE)


@pytest.mark.parametrize("recipe", RECIPES)
def test_dense_phases_are_dense_training_monitored_or_not(tmp_path, dataset, dense, recipe):
    flags = [*RECIPES[recipe], *PHASES]
    kept = ["--save-interval", "6", "--keep-last", "0"]
    rows = _run(tmp_path / "tracked", dataset, [*flags, *kept])
    assert [row["sparse"] for row in rows] == [False] * 3 + [True] * 3 + [False] * 2
    assert _exact(rows[:3]) == _exact(dense[:3])
    assert rows[3]["loss"] != dense[3]["loss"]

    # The tail: the same steps by the recipe `dense`, from the checkpoint before them.
    start = tmp_path / "start" / "step-00000006"
    shutil.copytree(tmp_path / "tracked" / "checkpoints" / start.name, start)
    tail = _run(
        tmp_path / "tail", dataset, [*DENSE, "--load", str(start.parent), "--override-recipe"]
    )
    assert _exact(rows[6:]) == _exact(tail)
    after, expected = _weights(tmp_path / "tracked"), _weights(tmp_path / "tail")
    assert after.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(after[key], value), key

    silent = _run(tmp_path / "silent", dataset, [*flags, "--no-track-flip-rate"])
    assert _exact(silent) == _exact(rows)
