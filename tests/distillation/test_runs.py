"""Retraining with a teacher: the same numbers in every layout, resumes, refusals."""

from __future__ import annotations

import pytest

from megasparse.train.checkpoint import newest_valid
from tests import dist
from tests.distillation.runs import AST, DENSE, TEACHER
from tests.parallel.layouts import CP2, FULL, PP2, SP, TP2, zero
from tests.runs import train

APART = ["--reset-attention-mask"]
EVALUATED = ["--eval-iters", "1", "--eval-interval", "3", *APART]
LAYOUTS = {
    "tp 2, sp": (2, [*TP2, *SP]),
    "dp 2, zero 2": (2, zero(2)),
    "dp 2, zero 3": (2, zero(3)),
    "cp 2, pp 2": (4, [*CP2, *PP2]),
    "tp 2, sp, pp 2, zero 1, full": (4, [*TP2, *SP, *PP2, *zero(1), *FULL]),
}


def _run(folder, dataset, dense, flags, world=1):
    arguments = [*AST, "--load", dense, "--data-path", dataset, "--run-dir", str(folder), *flags]
    return dist.run(train, world, arguments)[0]


@pytest.fixture(scope="module")
def single_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("single")


@pytest.fixture(scope="module")
def single(single_folder, dataset, dense):
    return _run(single_folder, dataset, dense, [*TEACHER, *EVALUATED])


def test_the_student_learns_from_its_teacher(single):
    for row in single:
        parts = 0.67 * row["kd_loss"] + 0.33 * row["lm_loss"]
        assert row["loss"] == pytest.approx(parts, rel=1e-5)
    # Pruned at once it is far from its teacher, and comes back.
    assert single[0]["kd_loss"] > 0.01
    assert single[3]["kd_loss"] < 0.8 * single[0]["kd_loss"]  # before its masks change


def _stored_loss(rank, world, folder, micro_batches):
    """Cross entropy of a run's saved weights, as a dense model without a teacher."""
    from megasparse.inference.offline import OfflineModel, StoredRun

    stored = StoredRun(folder)
    model = OfflineModel(stored)
    model.put(stored.folded())
    return model.loss(micro_batches)


def test_an_evaluation_is_the_cross_entropy_of_the_student_alone(single_folder, single):
    # An evaluation of one iteration is the 4 micro-batches of a global batch.
    (loss,) = dist.run(_stored_loss, 1, single_folder / "checkpoints", 4)
    assert single[-1]["valid_loss"] == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_gives_the_numbers_of_one_process(tmp_path, dataset, dense, single, layout):
    world, flags = LAYOUTS[layout]
    rows = _run(tmp_path, dataset, dense, [*TEACHER, *EVALUATED, *flags], world)
    for row, one in zip(rows, single, strict=True):
        for figure in ("loss", "kd_loss", "lm_loss", "valid_loss"):
            if figure in one:
                assert row[figure] == pytest.approx(one[figure], rel=1e-5), (figure, one["step"])
        assert row["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4), one["step"]
        assert row.get("flip_rate") == one.get("flip_rate")


def test_a_dense_student_of_its_own_weights_has_nothing_to_learn(tmp_path, dataset, dense):
    flags = [
        *DENSE,
        "--finetune",
        "--load",
        dense,
        "--kd-loss-weight",
        "1",
        "--lm-loss-weight",
        "0",
        "--train-iters",
        "2",
        "--weight-decay",
        "0",
    ]
    rows = dist.run(train, 1, [*flags, "--data-path", dataset, "--run-dir", str(tmp_path)])[0]
    assert rows[0]["kd_loss"] == pytest.approx(0.0, abs=1e-6)
    assert rows[0]["grad_norm"] < 1e-5


def test_resume_finds_the_teacher_again(tmp_path, dataset, dense, single):
    flags = [*TEACHER, *EVALUATED]
    _run(tmp_path, dataset, dense, [*flags, "--exit-interval", "5"])
    rows = _run(tmp_path, dataset, dense, [*flags, "--resume"])
    assert [(r["loss"], r["kd_loss"]) for r in rows] == [(r["loss"], r["kd_loss"]) for r in single]


@pytest.mark.parametrize(
    ("dtype", "layout"), [("bf16", (1, [])), ("fp8", (2, PP2)), ("fp8", (2, [*TP2, *SP]))]
)
def test_a_teacher_in_less_precision_is_near(tmp_path, dataset, dense, single, dtype, layout):
    flags = [*TEACHER, *APART, "--teacher-dtype", dtype, "--teacher-load", dense]
    flags += ["--train-iters", "2"]
    rows = _run(tmp_path, dataset, dense, [*flags, *layout[1]], layout[0])
    assert rows[0]["kd_loss"] == pytest.approx(single[0]["kd_loss"], rel=0.05)
    assert rows[0]["kd_loss"] != single[0]["kd_loss"]
    assert rows[0]["lm_loss"] == pytest.approx(single[0]["lm_loss"], rel=1e-6)


def test_the_student_in_bf16(tmp_path, dataset, dense, single):
    flags = [*TEACHER, *APART, "--bf16", "--train-iters", "2"]
    rows = _run(tmp_path, dataset, dense, flags)
    assert rows[0]["kd_loss"] == pytest.approx(single[0]["kd_loss"], rel=0.2)
    assert rows[0]["lm_loss"] == pytest.approx(single[0]["lm_loss"], rel=0.01)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--kd-loss-weight", "1"], "needs a teacher"),
        (["--finetune"], "finetune needs load"),
        (["--teacher-load", "x"], "there is no teacher"),
        (["--kd-loss-weight", "1", "--teacher-load", "/nowhere"], "holds no checkpoint"),
        (["--lm-loss-weight", "0.5"], "without a teacher"),
    ],
)
def test_refusals(tmp_path, dataset, flags, message):
    from megasparse.errors import MegasparseError
    from megasparse.preflight.settings import prepare

    with pytest.raises(MegasparseError, match=message):
        prepare([*DENSE, "--data-path", dataset, "--run-dir", str(tmp_path), *flags], 1)


def test_another_model_is_no_teacher(tmp_path, dataset, dense):
    with pytest.raises(RuntimeError, match="has num_layers 2, this run has 1"):
        _run(tmp_path, dataset, dense, [*TEACHER, "--num-layers", "1"])


def _poisoned(rank, world, fault, flags):
    import os

    os.environ["MEGASPARSE_FAULT"] = fault
    return train(rank, world, flags)


@pytest.mark.parametrize("layout", [(1, []), (2, PP2)], ids=["one", "pp 2"])
def test_a_step_with_a_nan_is_left_out_of_every_figure(tmp_path, dataset, dense, layout):
    world, more = layout
    flags = [
        *AST,
        *TEACHER,
        "--mask-metric",
        "wanda",
        "--max-skipped-steps",
        "1",
        "--load",
        dense,
        "--data-path",
        dataset,
        "--run-dir",
        str(tmp_path),
        *more,
    ]
    rows = dist.run(_poisoned, world, f"nan@{world - 1}:3:loss", flags)[0]
    assert [row["step"] for row in rows if row["loss"] is None] == [4]
    assert rows[3]["kd_loss"] is None and rows[3]["lm_loss"] is None
    for row in rows[:3] + rows[4:]:
        assert row["loss"] == pytest.approx(0.67 * row["kd_loss"] + 0.33 * row["lm_loss"], rel=1e-5)
    state = newest_valid(tmp_path / "checkpoints")
    name = "sparsity/decoder.layers.1.mlp.linear_fc1.weight/input"
    # Steps x sequences x tokens, after the calibration on 128 sequences.
    assert int(state.read(f"{name}_tokens")) == (9 * 8 + 128) * 16
    assert state.read(f"{name}_square").isfinite().all()
