"""What may not change silently on a resume is refused, and allowed by its own flag alone."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megasparse.checkpoint.compatibility import check_same_layout, check_same_run
from megasparse.checkpoint.sparsity_state import effective_weight
from megasparse.config import load_config, resolve, to_dict
from megasparse.errors import ConfigError
from megasparse.kernels import is_24
from megasparse.log import logger
from megasparse.metrics.schema import read_metrics
from megasparse.sparsity.recipe import make_recipe
from megasparse.train.checkpoint import newest_valid
from tests import forked
from tests.reliability.runs import DROPOUT, differences, flags, resume_at
from tests.runs import TINY, make_dataset

STEPS = ["--train-iters", "10"]


def _short(dataset: str, run_dir: Path, *more: str) -> list[str]:
    """A run of ten steps; masks are refreshed before steps 0, 4 and 8."""
    return flags(dataset, run_dir, *STEPS, *more)


@pytest.fixture(scope="module")
def cut(tmp_path_factory, dataset) -> Path:
    """A run that was cut off at step 6."""
    root = tmp_path_factory.mktemp("cut")
    run = _short(dataset, root / "run", "--exit-interval", "6")
    assert forked.run(run, 1, root / "log") == [75]
    return root / "run" / "checkpoints"


def _continue(tmp_path: Path, run: list[str], world: int = 1) -> tuple[int, str]:
    (tmp_path / "log.0").unlink(missing_ok=True)
    codes = forked.run(run, world, tmp_path / "log")
    return codes[0], (tmp_path / "log.0").read_text()


CHANGES = [
    ("override-batch", ["--global-batch-size", "8"], "global_batch_size 4, this run has 8"),
    ("override-seed", ["--seed", "5"], "seed 1234, this run has 5"),
    ("override-schedule", ["--lr", "2e-3"], "lr 0.001, this run has 0.002"),
    ("override-schedule", ["--train-iters", "12"], "train_iters 10, this run has 12"),
    ("override-schedule", ["--weight-decay", "0.2"], "weight_decay 0.1, this run has 0.2"),
    ("override-model", ["--norm-epsilon", "1e-6"], "norm_epsilon 1e-05, this run has 1e-06"),
    ("override-recipe", ["--masked-decay", "1e-2"], "masked_decay 0.001, this run has 0.01"),
    ("override-recipe", ["--sparsity-recipe", "sr_ste"], "'fst', this run has 'sr_ste'"),
    ("override-recipe", ["--sparsity-recipe", "dense", "--masked-decay", "none"], "'dense'"),
    ("override-data", ["--split", "80,20,0"], "split '90,10,0', this run has '80,20,0'"),
    ("override-precision", ["--bf16"], "bf16 False, this run has True"),
]


@pytest.mark.parametrize(("flag", "change", "words"), CHANGES)
def test_each_change_is_refused_and_has_its_flag(tmp_path, dataset, cut, flag, change, words):
    run = _short(dataset, tmp_path / "run", "--load", str(cut), *change)
    others = {name for name, _, _ in CHANGES} - {flag}
    code, text = _continue(tmp_path, [*run, *(f"--{name}" for name in sorted(others))])
    # No other flag allows it, so it is refused without any too.
    assert code == 64 and words in text and f"--{flag} continues with the change" in text
    code, text = _continue(tmp_path, [*run, f"--{flag}", "--override-rng"])
    assert code == 0, text


def test_a_change_of_the_schedule_is_told_in_one_line(tmp_path, dataset, cut):
    changes = ["--lr", "2e-3", "--lr-decay-style", "WSD", "--lr-wsd-decay-iters", "5"]
    run = _short(dataset, tmp_path / "run", "--load", str(cut), "--override-schedule", *changes)
    code, text = _continue(tmp_path, run)
    assert code == 0, text
    told = (
        "--override-schedule: lr 0.001 -> 0.002, lr_decay_style 'cosine' -> 'WSD', "
        "lr_wsd_decay_iters None -> 5\n"
    )
    assert told in text


# What may change without a word; a new field is decided on here or in GUARDED.
FREE = {
    "parallel": None, "checkpoint": None, "logging": None,
    "train": {
        "micro_batch_size", "lr_warmup_fraction", "deterministic_mode", "cuda_graph_impl",
        "transformer_impl", "exit_interval", "exit_duration_in_mins", "max_skipped_steps",
    },
    "fp8": {"fp8_fallback"},
    "distillation": {"teacher_load"},
    "bert": {"train_data", "valid_data"},  # their digests are compared
    "data": {
        # Their digests are compared.
        "data_path", "train_data_path", "valid_data_path", "test_data_path", "tokenizer_model",
        "tokenizer_type", "vocab_file", "merge_file", "data_cache_path", "num_workers",
        "calibration_samples", "multiple_validation_sets",
        "verify_data",
    },
}  # fmt: skip


def _other(value):
    """A value of the same kind."""
    kinds = {bool: lambda v: not v, int: lambda v: v + 1, float: lambda v: v + 0.5}
    return kinds.get(type(value), lambda v: f"{v}x" if isinstance(v, str) else 7)(value)


def test_every_setting_may_change_or_is_told_old_and_new(caplog, monkeypatch):
    config = resolve(load_config([*TINY, "--mock-data"]), 1)
    monkeypatch.setattr(logger, "propagate", True)
    for group in dataclasses.fields(config):
        section = getattr(config, group.name)
        for field in dataclasses.fields(section):
            tree, before = to_dict(config), getattr(section, field.name)
            tree[group.name][field.name] = other = _other(before)
            meta = {"config": tree, "digests": {}}
            reader = SimpleNamespace(folder="there", imported=False, meta=meta)
            free = FREE.get(group.name, set())
            if free is None or field.name in free:
                check_same_run(reader, config, {})
                continue
            where = f"{group.name}.{field.name}: add it to GUARDED, or to FREE here"
            with pytest.raises(ConfigError) as refused:
                check_same_run(reader, config, {})
                pytest.fail(where)
            assert f"with {field.name} " in str(refused.value), where
            flag = str(refused.value).split("; --")[1].split()[0].replace("-", "_")
            overridden = dataclasses.replace(config.checkpoint, **{flag: True})
            caplog.clear()
            with caplog.at_level(logging.INFO, logger=logger.name):
                allowed = dataclasses.replace(config, checkpoint=overridden)
                check_same_run(reader, allowed, {})
            assert f"{field.name} {other!r} -> {before!r}" in caplog.text, field.name


def test_sequence_length_and_data_have_flags_of_their_own(tmp_path, dataset, cut):
    plain = [*TINY, *STEPS, *DROPOUT, "--run-dir", str(tmp_path / "run"), "--load", str(cut)]
    longer = [*plain, "--data-path", dataset, "--seq-length", "16"]
    code, text = _continue(tmp_path, longer)
    assert code == 64 and "seq_length 32, this run has 16; --override-seq-length" in text
    other = make_dataset(tmp_path / "other", seed=1)
    code, text = _continue(tmp_path, [*plain, "--data-path", other])
    assert code == 64 and "--override-data" in text
    code, text = _continue(tmp_path, [*plain, "--data-path", other, "--override-data"])
    assert code == 0, text
    same = make_dataset(tmp_path / "moved")  # the same data in another place is the same data
    run = [*TINY, *STEPS, *DROPOUT, "--run-dir", str(tmp_path / "moved-run"), "--load", str(cut)]
    code, text = _continue(tmp_path, [*run, "--data-path", same])
    assert code == 0, text


def test_samples_go_on_where_they_were_after_a_change_of_the_batch(tmp_path, dataset, cut):
    run = _short(
        dataset,
        tmp_path / "run",
        "--load",
        str(cut),
        "--global-batch-size",
        "8",
        "--override-batch",
    )
    assert _continue(tmp_path, run)[0] == 0
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["consumed_samples"] for row in rows[:2]] == [32, 40]  # 24 were consumed


@pytest.mark.parametrize("recipe", ["fst", "ste", "s_ste"])
def test_dense_to_sparse_gives_two_of_four_everywhere(tmp_path, dataset, recipe):
    dense = ["--sparsity-recipe", "dense", "--masked-decay", "none"]
    first = _short(dataset, tmp_path / "dense", *dense, "--exit-interval", "3")
    assert forked.run(first, 1, tmp_path / "first") == [75]
    decay = [] if recipe == "fst" else ["--masked-decay", "none"]
    run = _short(
        dataset,
        tmp_path / "run",
        "--load",
        str(tmp_path / "dense" / "checkpoints"),
        "--sparsity-recipe",
        recipe,
        *decay,
        "--override-recipe",
    )
    code, text = _continue(tmp_path, run)
    assert code == 0, text
    reader = newest_valid(tmp_path / "run" / "checkpoints")
    names = {key.split("/")[1] for key in reader.keys("sparsity/")}
    assert len(names) == 4
    for name in names:
        weight = effective_weight(reader, name, make_recipe(recipe, dense_tail_fraction=0.0))
        assert is_24(weight)
        if recipe != "s_ste":
            assert bool(((weight != 0).view(-1, 4).sum(1) == 2).all())


def test_dropout_in_another_layout_needs_a_word(tmp_path, dataset, cut):
    run = _short(dataset, tmp_path / "run", "--load", str(cut))
    code, text = _continue(tmp_path, run, world=2)
    assert code == 64 and "--override-rng continues with the change" in text
    assert _continue(tmp_path, [*run, "--override-rng"], world=2)[0] == 0


LAYOUTS = {
    "tp2": ["--tensor-model-parallel-size", "2"],
    "tp2-sp": ["--tensor-model-parallel-size", "2", "--sequence-parallel"],
    "dp2": [],
    "dp2-zero1": ["--zero-stage", "1"],
}


# A draw of MVUE turns over where rounding meets its threshold, which differs by layout and machine.
WITHOUT_DRAWS = ["--mvue", "off"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, dataset) -> list[dict[str, Any]]:
    """The rows of a run of one rank without dropout, which no layout repeats."""
    root = tmp_path_factory.mktemp("undisturbed")
    run = [*TINY, *STEPS, *WITHOUT_DRAWS, "--data-path", dataset]
    run += ["--run-dir", str(root / "run")]
    assert forked.run(run, 1, root / "log") == [0]
    return read_metrics(root / "run" / "metrics.jsonl")


@pytest.mark.parametrize("before", ["one", "tp2", "dp2-zero1"])
def test_another_layout_goes_on_with_equal_samples_and_losses(
    tmp_path, dataset, undisturbed, before
):
    plain = [*TINY, *STEPS, *WITHOUT_DRAWS, "--data-path", dataset]
    world = 1 if before == "one" else 2
    cut = [*plain, "--run-dir", str(tmp_path / "cut"), "--exit-interval", "6"]
    codes = forked.run([*cut, *LAYOUTS.get(before, [])], world, tmp_path / "cut.log")
    assert codes == [75] * world
    for name, layout in {"one": [], **LAYOUTS}.items():
        if name == before:
            continue
        world = 1 if name == "one" else 2
        run = [
            *plain,
            "--run-dir",
            str(tmp_path / name),
            "--load",
            str(tmp_path / "cut" / "checkpoints"),
            *layout,
        ]
        assert forked.run(run, world, tmp_path / name) == [0] * world
        rows = read_metrics(tmp_path / name / "metrics.jsonl")
        assert len(rows) == 4
        for row, other in zip(rows, undisturbed[6:], strict=True):
            assert row["samples"] == other["samples"]
            assert row["loss"] == pytest.approx(other["loss"], rel=2e-6), (name, row["step"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory, dataset) -> Path:
    """A folder with an undisturbed run of two ranks, `reference`."""
    root = tmp_path_factory.mktemp("whole")
    assert forked.run(_short(dataset, root / "reference"), 2, root / "log") == [0, 0]
    return root


@pytest.mark.parametrize("step", [1, 4, 9])
def test_a_resume_is_exact_at_any_step(dataset, whole, step):
    assert resume_at(dataset, whole, step, 2, *STEPS) == []


def test_save_load_save_gives_the_same_bytes(tmp_path, dataset):
    run = flags(dataset, tmp_path / "run", "--exit-interval", "5")
    assert forked.run(run, 1, tmp_path / "log") == [75]
    again = [*flags(dataset, tmp_path / "again"), "--load", str(tmp_path / "run" / "checkpoints")]
    environment = {"MEGASPARSE_FAULT": "term@0:*:build"}
    assert forked.run(again, 1, tmp_path / "again.log", environment) == [75]
    first, second = (newest_valid(tmp_path / d / "checkpoints") for d in ("run", "again"))
    assert first.meta["step"] == second.meta["step"] == 5
    assert differences(tmp_path / "run", tmp_path / "run") == []
    assert first.keys() == second.keys()
    for key in first.keys():  # noqa: SIM118
        values = [reader.read(key) for reader in (first, second)]
        assert values[0].dtype == values[1].dtype and torch.equal(*values), key


def test_other_tokens_of_the_same_tokenizer_are_refused():
    config = resolve(load_config([*TINY, "--data-path", "d"]), 1)
    tokens = {"tokenizer": "t", "tokens": '{"eod": 3}'}
    meta = {"config": to_dict(config), "digests": {"all.d": "x", **tokens}}
    reader: Any = SimpleNamespace(imported=False, folder="run", meta=meta)
    check_same_run(reader, config, {"all.elsewhere": "x", **tokens})
    other = {"all.d": "x", **tokens, "tokens": '{"eod": 2}'}
    with pytest.raises(ConfigError, match="the tokens .*3.*--override-tokenizer"):
        check_same_run(reader, config, other)
    config.checkpoint.override_tokenizer = True
    check_same_run(reader, config, other)
    del meta["digests"]["tokens"]  # by a version that did not keep them
    config.checkpoint.override_tokenizer = False
    check_same_run(reader, config, other)


def test_a_layout_without_context_parallelism_may_leave_it_out():
    """Checkpoints from before context parallelism do not say its size."""
    config = resolve(load_config([*TINY, "--data-path", "d"]), 1)
    old = {"tp": 1, "pp": 1, "dp": 2}
    reader: Any = SimpleNamespace(meta={"layout": old})
    assert check_same_layout(reader, config, {"cp": 1, **old})
    assert not check_same_layout(reader, config, {"cp": 2, **old})
    assert not check_same_layout(reader, config, {"cp": 1, **old, "dp": 1})
    reader.meta["layout"] = {"cp": 2, **old}
    assert check_same_layout(reader, config, {"cp": 2, **old})
