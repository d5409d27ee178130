"""Each phase of a run is its recipe alone: dense steps, and any other, from one checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from megasparse.checkpoint.proof import check_sparsity, require_sparsity
from megasparse.checkpoint.reader import CheckpointReader
from megasparse.config import load_config, resolve
from megasparse.errors import ConfigError
from megasparse.metrics.schema import read_metrics
from megasparse.sparsity.recipe import make_recipe
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


# Two steps each; masks are due at steps 0 and 4, and wherever a phase begins.
SCHEDULE = [
    ("dense", ["--sparsity-recipe", "dense", "--masked-decay", "none"]),
    # Not all of the run: its first mask is that of its first step.
    ("fst", ["--sparsity-recipe", "fst", "--dense-warmup-fraction", "0.25"]),
    (
        "row+grad-input=double-pruned+mvue=off",
        ["--sparsity-recipe", "sr_ste", "--sparse-grad-input", "double-pruned"],
    ),
    ("s_ste_3", ["--sparsity-recipe", "s_ste_3", "--masked-decay", "none"]),
]
ALL = ["--sparsity-phases", ",".join(f"{name}:1/4" for name, _ in SCHEDULE)]
KEPT = ["--save-interval", "1", "--keep-last", "0", "--log-interval", "1"]


@pytest.fixture(scope="module")
def scheduled(dataset, tmp_path_factory):
    """A run of all phases, with a checkpoint of every step."""
    folder = tmp_path_factory.mktemp("phases")
    return folder / "checkpoints", _run(folder, dataset, [*ALL, *KEPT])


def _checkpoint(root, step):
    return str(root / f"step-{step:08}")


def test_a_schedule_of_phases(scheduled):
    root, rows = scheduled
    assert [row["sparse"] for row in rows] == [False] * 2 + [True] * 6
    assert [row["masked_decay"] for row in rows] == [0.0] * 2 + [1e-3] * 4 + [0.0] * 2
    assert all(row["density"] == 1.0 for row in rows[:2])
    assert all(row["density"] <= 0.5 and row["flip_rate"] > 0 for row in rows[3:])
    assert ["double_pruned" in row for row in rows if row["step"] in (4, 5, 7)] == [
        False,
        True,
        True,
    ]
    reader = newest_valid(root)
    recipe = make_recipe("fst", sparsity_phases=ALL[1])
    tensors = check_sparsity(reader, recipe, 8)
    require_sparsity(tensors, recipe, 8, 8)
    assert len(tensors) == 4
    assert all(one.rows_24 and not one.columns_24 for one in tensors)


@pytest.mark.parametrize("phase", [1, 2, 3])
def test_a_phase_is_its_recipe_alone(tmp_path, dataset, scheduled, phase):
    """From the checkpoint before it, bit for bit: losses, and the weights that it leaves."""
    root, rows = scheduled
    flags = [*SCHEDULE[phase][1], "--branch-from", _checkpoint(root, 2 * phase)]
    stop = ["--exit-interval", str(2 * phase + 2)]
    alone = _run(tmp_path, dataset, [*flags, *stop])
    assert _exact(alone) == _exact(rows[2 * phase : 2 * phase + 2])
    found, expected = _weights(tmp_path), CheckpointReader(Path(_checkpoint(root, 2 * phase + 2)))
    for key, value in found.items():
        assert torch.equal(expected.read(key), value), key


def test_a_resume_over_changes_of_phase_is_exact(tmp_path, dataset, scheduled):
    root, rows = scheduled
    start = tmp_path / "start" / "step-00000003"
    shutil.copytree(_checkpoint(root, 3), start)
    resumed = _run(tmp_path / "run", dataset, [*ALL, "--load", str(start.parent)])
    assert _exact(resumed) == _exact(rows[3:])
    found, expected = _weights(tmp_path / "run"), _weights(root.parent)
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in found.items())


def test_a_branch_has_other_phases_and_a_folder_of_its_own(tmp_path, dataset, scheduled):
    """It says so in one line; what it began with stays, and it can be resumed."""
    root, rows = scheduled
    tail = ["--sparsity-phases", "dense:1/4,fst:1/4,row:1/2"]
    flags = [*tail, "--branch-from", _checkpoint(root, 4)]
    said = dist.run(_said, 1, [*TINY, *STEPS, "--data-path", dataset, *flags], str(tmp_path))[0]
    (line,) = [line for line in said if "sparsity_phases" in line]
    assert line == f"--branch-from: sparsity_phases {ALL[1]!r} -> {tail[1]!r}"
    assert any(line.startswith("phase 3 of 3, steps 5 to 8: row weights") for line in said)
    branch = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in branch] == [5, 6, 7, 8]
    assert branch[0]["samples"] == rows[4]["samples"] and branch[0]["lr"] == rows[4]["lr"]
    assert newest_valid(root).meta["step"] == 8 and len(list(root.glob("step-*"))) == 8
    with pytest.raises(ConfigError, match="branch_from and load are both set"):
        resolve(load_config([*TINY, "--mock-data", *flags, "--load", str(root)]), 1)


def _said(rank, world, arguments, folder):
    """The lines of a run's log."""
    import logging

    from megasparse.log import logger

    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        train(rank, world, [*arguments, "--run-dir", folder])
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    return lines
