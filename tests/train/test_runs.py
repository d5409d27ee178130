"""End-to-end runs as data: a name, flags, ranks; and what must be true of the result."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from megasparse.checkpoint.proof import check_sparsity, require_sparsity
from megasparse.checkpoint.sparsity_state import effective_weight
from megasparse.errors import CheckpointError
from megasparse.sparsity.recipe import PRESETS, make_recipe
from megasparse.train.checkpoint import newest_valid
from tests import dist
from tests.runs import LLAMA, TINY, train

TP2 = ["--tensor-model-parallel-size", "2"]
STEPS = 32
FAST = ["--lr", "1e-2", "--train-iters", str(STEPS)]


def _run(tmp_path, dataset, name, flags, world=1):
    run_dir = tmp_path / name
    arguments = [*TINY, "--data-path", dataset, "--run-dir", str(run_dir), *flags]
    return dist.run(train, world, arguments)[0], run_dir


@pytest.fixture(scope="module")
def plain(tmp_path_factory, dataset):
    """The rows of a run of one rank without any flag; made once."""
    return _run(tmp_path_factory.mktemp("plain"), dataset, "plain", [])[0]


RUNS = {
    # name: (flags, ranks, recipe)
    "dense": (["--sparsity-recipe", "dense", "--masked-decay", "none"], 1, "dense"),
    "ste": (["--sparsity-recipe", "ste", "--masked-decay", "none"], 1, "ste"),
    "sr_ste": (["--sparsity-recipe", "sr_ste"], 1, "sr_ste"),
    "fst-tp2": (TP2, 2, "fst"),
    "fst-llama-tp2-sp": ([*LLAMA, *TP2, "--sequence-parallel"], 2, "fst"),
    "fst-approximate": (["--mvue", "approximate"], 1, "fst"),
    "fst-bf16-dp2": (["--bf16"], 2, "fst"),
    "s_ste-fp8": (
        ["--sparsity-recipe", "s_ste", "--masked-decay", "none", "--simulate-fp8"], 1, "s_ste",
    ),
    "s_ste_3-tp2": (["--sparsity-recipe", "s_ste_3", "--masked-decay", "none", *TP2], 2, "s_ste_3"),
    "ast-zero1": (
        ["--sparsity-recipe", "ast", "--masked-decay-ramp-iters", "10", "--zero-stage", "1",
         "--sparse-layers", "*.self_attention.linear_*", "*.mlp.linear_*"], 2, "ast",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_loss_falls_and_the_checkpoint_is_what_the_recipe_promises(tmp_path, dataset, name):
    flags, world, recipe_name = RUNS[name]
    rows, run_dir = _run(tmp_path, dataset, name, [*FAST, *flags], world)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    first, last = (sum(row["loss"] for row in rows[s]) / 5 for s in (slice(0, 5), slice(-5, None)))
    assert last < first - 0.7, (first, last)
    reader = newest_valid(run_dir / "checkpoints")
    assert reader.meta["step"] == STEPS
    recipe = make_recipe(recipe_name, dense_tail_fraction=0.0)
    tensors = check_sparsity(reader, recipe, STEPS)
    require_sparsity(tensors, recipe, STEPS, STEPS)
    assert len(tensors) == {"dense": 0, "ast": 8}.get(recipe_name, 4)
    for tensor in tensors:
        assert tensor.rows_24 and tensor.columns_24 == (recipe_name == "fst")
        assert tensor.density <= 0.5
    if tensors:
        assert all("flip_rate" in row and row["density"] <= 0.5 for row in rows[-10:])
    # What grad_input lacks of the weight, where it is pruned twice: at the start 3.5 %, as of
    # normal weights.
    found = [row["double_pruned"] for row in rows if "double_pruned" in row]
    assert bool(found) == recipe.double_pruned and all(0.03 < one < 0.05 for one in found)


def test_metrics_have_every_figure_and_the_run_dir_every_part(tmp_path, dataset):
    flags = ["--eval-iters", "1", "--eval-interval", "10", "--save-interval", "10"]
    rows, run_dir = _run(tmp_path, dataset, "run", flags)
    for row in rows:
        assert {
            "step",
            "loss",
            "grad_norm",
            "lr",
            "consumed_samples",
            "tokens_per_second",
            "density",
            "masked_decay",
            "sparse",
            "samples",
        } <= row.keys()
        assert row["consumed_samples"] == 4 * row["step"]
    assert [row["step"] for row in rows if "valid_loss" in row] == [10, 20]
    assert {entry.name for entry in run_dir.iterdir()} >= {
        "config.yaml",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
    }
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run_dir / "tensorboard"))
    board.Reload()
    tags = set(board.Tags()["scalars"])
    assert {
        "curves/loss",
        "curves/validation_loss",
        "curves/learning_rate",
        "training/grad_norm",
        "sparsity/flip_rate",
        "sparsity/density",
        "curves/tokens_per_second",
        "z_layers_flip_rate/decoder.layers.1.mlp.linear_fc2.weight",
        "z_layers_density/decoder.layers.0.mlp.linear_fc1.weight",
    } <= tags
    assert [e.value for e in board.Scalars("curves/loss")] == pytest.approx(
        [row["loss"] for row in rows]
    )


def test_dense_tail_switches_at_its_step_and_ends_dense(tmp_path, dataset, plain):
    rows, run_dir = _run(tmp_path, dataset, "tail", ["--dense-tail-fraction", "0.25"])
    assert [row["sparse"] for row in rows] == [True] * 15 + [False] * 5
    assert [row["masked_decay"] for row in rows] == [1e-3] * 15 + [0.0] * 5
    recipe = make_recipe("fst", dense_tail_fraction=0.25)
    reader = newest_valid(run_dir / "checkpoints")
    tensors = check_sparsity(reader, recipe, 20)
    assert len(tensors) == 4
    for tensor in tensors:
        assert tensor.density > 0.99 and not tensor.rows_24
    # Up to the switch it is the run without a tail; at it, the forward pass is another.
    assert [row["loss"] for row in rows[:15]] == [row["loss"] for row in plain[:15]]
    assert rows[15]["loss"] != plain[15]["loss"]


DROPOUT = ["--hidden-dropout", "0.1", "--attention-dropout", "0.1"]


@pytest.mark.parametrize(
    ("flags", "world"),
    [
        (DROPOUT, 1),
        ([*TP2, *DROPOUT], 2),
        (["--bf16", *DROPOUT], 2),
        (["--bf16", "--zero-stage", "3", *DROPOUT], 2),
    ],
    ids=["one", "tp2", "zero1-bf16", "zero3-bf16"],
)
def test_resume_repeats_the_run_bit_for_bit(tmp_path, dataset, flags, world):
    flags = [*flags, "--train-iters", "12"]
    whole, whole_dir = _run(tmp_path, dataset, "whole", flags, world)
    _run(tmp_path, dataset, "cut", [*flags, "--exit-interval", "7"], world)
    resumed, cut_dir = _run(tmp_path, dataset, "cut", [*flags, "--resume"], world)
    exact = ("step", "loss", "grad_norm", "lr", "samples", "flip_rate", "density")
    for a, b in zip(whole, resumed, strict=True):
        assert {key: a.get(key) for key in exact} == {key: b.get(key) for key in exact}
    a, b = newest_valid(whole_dir / "checkpoints"), newest_valid(cut_dir / "checkpoints")
    assert sorted(a.keys()) == sorted(b.keys())
    for key in sorted(a.keys()):
        assert torch.equal(a.read(key), b.read(key)), key


def test_resume_refuses_another_run_and_a_fresh_run_refuses_to_overwrite(tmp_path, dataset):
    _run(tmp_path, dataset, "run", ["--exit-interval", "5"])
    for flags, message in (
        ([], "already holds checkpoints of a run"),
        (["--resume", "--lr", "2e-3"], "was trained with lr 0.001, this run has 0.002"),
        (["--resume", "--masked-decay", "0.5"], "masked_decay 0.001, this run has 0.5"),
        (["--load", str(tmp_path / "nothing"), "--run-dir", str(tmp_path / "x")], "no checkpoint"),
    ):
        with pytest.raises(RuntimeError, match=message):
            _run(tmp_path, dataset, "run", flags)


def test_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path, dataset, plain):
    flags = ["--save-interval", "5", "--exit-interval", "10"]
    _, run_dir = _run(tmp_path, dataset, "cut", flags)
    path = run_dir / "checkpoints" / "step-00000010" / "rank-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    resumed, _ = _run(tmp_path, dataset, "cut", ["--resume"])
    assert [row["loss"] for row in resumed] == [row["loss"] for row in plain]


def test_report_fails_when_a_tensor_is_not_24(tmp_path, dataset):
    _, run_dir = _run(tmp_path, dataset, "dense-masks", ["--dense-tail-fraction", "0.5"])
    recipe = PRESETS["fst"]
    reader = newest_valid(run_dir / "checkpoints")
    dense = check_sparsity(reader, make_recipe("fst", dense_tail_fraction=0.5), 20)
    with pytest.raises(CheckpointError, match="not 2:4 as fst promises: decoder.layers.0"):
        require_sparsity(dense, make_recipe("fst", dense_tail_fraction=0.0), 20, 20)
    name = dense[0].name
    assert effective_weight(reader, name, recipe).shape == dense[0].shape


def test_nan_stops_the_run_before_the_update(tmp_path, dataset):
    with pytest.raises(RuntimeError, match="no update was made"):
        _run(tmp_path, dataset, "nan", ["--lr", "1e30", "--clip-grad", "0"])
    assert Path(tmp_path / "nan" / "metrics.jsonl").exists()


def test_the_learning_rate_of_every_step(plain):
    """Cosine from 1e-3 to 0 over 20 steps: the first step has all of it, the 11th half."""
    rates = [row["lr"] for row in plain]
    assert rates == pytest.approx(
        [1e-3 * 0.5 * (1 + math.cos(math.pi * step / 20)) for step in range(20)], rel=1e-12
    )
