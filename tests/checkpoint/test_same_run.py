"""What a change needs a word for, and whose word: the cases that no run of a test comes by."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest

from megasparse.checkpoint.compatibility import check_same_layout, check_same_run
from megasparse.config import ResolvedConfig, load_config, resolve, to_dict
from megasparse.errors import ConfigError
from tests.runs import TINY


def _config(*flags: str) -> ResolvedConfig:
    return resolve(load_config([*TINY, "--data-path", "d", *flags]), 1)


def _reader(config: ResolvedConfig, **digests: str) -> Any:
    meta = {"config": to_dict(config), "digests": digests, "layout": {"tp": 1, "dp": 2}}
    return SimpleNamespace(folder="there", imported=False, meta=meta)


def _with(config: ResolvedConfig, group: str, **changes: Any) -> ResolvedConfig:
    section = dataclasses.replace(getattr(config, group), **changes)
    return dataclasses.replace(config, **{group: section})


def test_steps_that_follow_from_samples_may_change_and_nothing_else_with_them():
    steps = TINY.index("--train-iters")
    flags = [*TINY[:steps], *TINY[steps + 2 :], "--data-path", "d", "--train-samples", "80"]
    config = resolve(load_config(flags), 1)
    reader = _reader(config)
    check_same_run(reader, _with(config, "train", train_iters=7), {})
    with pytest.raises(ConfigError, match="train_samples 80, this run has 96"):
        check_same_run(reader, _with(config, "train", train_samples=96), {})
    with pytest.raises(ConfigError, match="with lr "):
        check_same_run(reader, _with(config, "train", lr=0.5), {})


def test_a_branch_may_change_the_recipe_alone():
    config = _config()
    branch = _with(config, "checkpoint", branch_from="elsewhere")
    reader = _reader(config)
    check_same_run(reader, _with(branch, "sparsity", mask_update_interval=9), {})
    with pytest.raises(ConfigError, match="--override-recipe"):
        check_same_run(reader, _with(config, "sparsity", mask_update_interval=9), {})
    with pytest.raises(ConfigError, match="--override-seed"):
        check_same_run(reader, _with(branch, "train", seed=9), {})


def test_a_field_that_the_writer_did_not_have_had_its_default():
    config = _config()
    reader = _reader(config)
    del reader.meta["config"]["train"]["clip_grad"]
    del reader.meta["config"]["bert"]
    check_same_run(reader, config, {})
    with pytest.raises(ConfigError, match="with clip_grad "):
        check_same_run(reader, _with(config, "train", clip_grad=0.125), {})


@pytest.mark.parametrize(
    ("saved", "given", "allowed"),
    [
        ({"train.a": "1"}, {"train.b": "1"}, True),  # it was moved
        ({"train.a": "1"}, {"train.a": "2"}, False),
        ({"train.a": "1"}, {"valid.a": "1"}, False),
        ({"train.a": "1"}, {}, False),
        # Digests of all bytes are compared where both have read them.
        ({"sha256:train:0": "1"}, {}, True),
        ({}, {"sampled:train:0": "1"}, True),
        ({"sha256:train:0": "1"}, {"sha256:train:0": "2"}, False),
        ({"sampled:train:0": "1"}, {"sampled:train:0": "1"}, True),
    ],
)
def test_other_data_needs_a_word(saved, given, allowed):
    config = _config()
    reader = _reader(config, **saved)
    if allowed:
        check_same_run(reader, config, given)
        return
    with pytest.raises(ConfigError, match="--override-data"):
        check_same_run(reader, config, given)
    check_same_run(reader, _with(config, "checkpoint", override_data=True), given)


@pytest.mark.parametrize("where", ["hidden_dropout", "attention_dropout", None])
def test_dropout_of_either_kind_needs_a_word_in_another_layout(where):
    config = _config()
    reader = _reader(config)
    same, other = {"cp": 1, "tp": 1, "dp": 2}, {"cp": 1, "tp": 2, "dp": 1}
    assert not check_same_layout(reader, config, other)
    if where is None:
        return
    dropped = _with(config, "model", **{where: 0.1})
    assert check_same_layout(reader, dropped, same)
    with pytest.raises(ConfigError, match="--override-rng"):
        check_same_layout(reader, dropped, other)
    assert not check_same_layout(reader, _with(dropped, "checkpoint", override_rng=True), other)
