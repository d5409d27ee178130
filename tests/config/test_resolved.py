"""A resolved configuration holds what its type promises, and is written as before."""

from __future__ import annotations

import dataclasses

import pytest

from megasparse.config import (
    CompleteModel,
    ModelConfig,
    ParallelConfig,
    ResolvedConfig,
    ResolvedModel,
    RunConfig,
    TrainConfig,
    dump_yaml,
    fill_defaults,
    from_dict,
    load_config,
    narrowed,
    resolve,
    to_dict,
)
from megasparse.errors import ConfigError

FLAGS = ["--mock-data", "--vocab-size", "128", "--lr-warmup-fraction", "0.1", "--swiglu"]


def test_a_resolved_configuration_has_the_same_fields_and_yaml():
    resolved = resolve(load_config(FLAGS), 2)
    assert isinstance(resolved, ResolvedConfig) and isinstance(resolved.model, ResolvedModel)
    assert [f.name for f in dataclasses.fields(resolved)] == [
        f.name for f in dataclasses.fields(RunConfig)
    ]
    stored = from_dict(to_dict(resolved), "here")
    assert dump_yaml(stored) == dump_yaml(resolved)


@pytest.mark.parametrize(
    ("more", "width"),
    [
        ([], 2048),
        (["--squared-relu"], 2048),
        (["--swiglu"], 1344),  # 8/3 of 512, down to whole 64s: as many parameters as without gate
        (["--geglu"], 1344),
        (["--swiglu", "--hidden-size", "16"], 64),
        (["--swiglu", "--ffn-hidden-size", "100"], 100),
    ],
)
def test_the_default_width_of_the_ffn(more, width):
    flags = ["--mock-data", "--hidden-size", "512", "--num-attention-heads", "4", *more]
    assert resolve(load_config([*flags, "--vocab-size", "128"]), 1).model.ffn_hidden_size == width


def test_what_was_filled_once_stays():
    once = fill_defaults(load_config(FLAGS), 2)
    assert to_dict(fill_defaults(once, 2)) == to_dict(once)
    assert fill_defaults(load_config(FLAGS), 2).train.lr_warmup_iters == 10


def test_the_configuration_that_is_filled_stays_as_it_was():
    given = load_config(FLAGS)
    before = to_dict(given)
    resolve(given, 2)
    assert to_dict(given) == before


def test_a_promise_that_is_not_kept_is_named():
    with pytest.raises(ConfigError, match="a file: ffn_hidden_size is not set"):
        narrowed(ResolvedModel, ModelConfig(), "a file")
    model = fill_defaults(RunConfig(), 1).model
    assert model.vocab_size is None
    with pytest.raises(ConfigError, match="a file: vocab_size is not set"):
        narrowed(CompleteModel, model, "a file")


def test_a_model_alone_is_enough():
    config = fill_defaults(RunConfig(ModelConfig(), ParallelConfig(), TrainConfig(bf16=True)), 1)
    assert config.parallel.zero_stage == 1 and config.parallel.recompute_chunk == 1
