"""DeepSpeed's dict: what the flags say, and what a file may add to it."""

from __future__ import annotations

import json

import pytest

from megasparse.config import load_config, read_config, resolve
from megasparse.config.deepspeed.derived import deepspeed_config
from megasparse.config.deepspeed.keys import FIELDS_OF, MISSING, NOTHING, PASSED_ON, READ
from megasparse.config.fields import FIELDS
from megasparse.errors import ConfigError
from tests import dist
from tests.runs import TINY, train

MOCK = [*TINY, "--mock-data"]


def _config(tmp_path, text: str, *flags: str):
    path = tmp_path / "extra.json"
    path.write_text(text)
    return resolve(load_config([*MOCK, *flags, "--deepspeed_config", str(path)]), 2)


def test_a_file_adds_what_the_flags_do_not_say(tmp_path):
    extra = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": 1, "reduce_bucket_size": 1000},
        "wall_clock_breakdown": True,
        "flops_profiler": {"enabled": False},
    }
    config = _config(tmp_path, json.dumps(extra), "--zero-stage", "1")
    plain = deepspeed_config(resolve(load_config([*MOCK, "--zero-stage", "1"]), 2), 2)
    expected = {
        **plain,
        "wall_clock_breakdown": True,
        "flops_profiler": {"enabled": False},
        "zero_optimization": {**plain["zero_optimization"], "reduce_bucket_size": 1000},
    }
    assert deepspeed_config(config, 2) == expected


# A setting that a flag has, and what the JSON says of it.
AGREEING = {
    "train_batch_size": (4, "--global-batch-size", "4"),
    "train_micro_batch_size_per_gpu": (2, "--micro-batch-size", "2"),
    "gradient_accumulation_steps": (3, "--global-batch-size", "12"),
    "gradient_clipping": (0.5, "--clip-grad", "0.5"),
    "zero_optimization": ({"stage": 2}, "--zero-stage", "2"),
    "bf16": ({"enabled": True}, "--bf16", None),
    "data_types": (
        {"grad_accum_dtype": "bf16"},
        "--no-accumulate-allreduce-grads-in-fp32",
        None,
    ),
    "fp16": ({"enabled": True, "loss_scale": 0, "hysteresis": 2}, "--bf16", None),
}
BARE = [
    word
    for pair in zip(MOCK[::2], MOCK[1::2])
    if pair[0] not in ("--micro-batch-size", "--global-batch-size", "--lr")
    for word in pair
]
BARE = [*BARE, "--mock-data"]


def _read(tmp_path, tree, *flags, world=2):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(tree))
    argv = [*BARE, *flags, "--deepspeed_config", str(path)]
    return read_config(argv, world_size=world)


@pytest.mark.parametrize("key", AGREEING)
def test_what_the_json_says_alone_is_taken_over(tmp_path, key):
    value, flag, word = AGREEING[key]
    config, line = _read(tmp_path, {key: value}, *(["--micro-batch-size", "2"] * (word == "12")))
    spelt = flag.replace("--no-", "--")
    assert not line.problems and any(told.startswith(spelt) for told in line.translated)
    flags = [flag] if word is None else [flag, word]
    flags += ["--micro-batch-size", "2"] if word == "12" else []
    expected = load_config([*BARE, *flags, "--deepspeed_config", str(tmp_path / "ds.json")])
    assert config == expected and config != load_config(BARE)
    deepspeed_config(resolve(config, 2), 2)  # and the engine reads it again
    # A flag that agrees is no contradiction; one that does not is told with both values.
    assert not deepspeed_problems(tmp_path, {key: value}, flags)
    other = {"--bf16": ["--no-bf16"], "--zero-stage": [flag, "1"]}.get(flag, [flag, "24"])
    other = [spelt] if spelt != flag else other
    (told,) = deepspeed_problems(tmp_path, {key: value}, [*flags, *other])
    assert f"but {spelt} is" in told


def deepspeed_problems(tmp_path, tree, flags, world=2):
    config, line = _read(tmp_path, tree, *flags, world=world)
    assert not line.problems
    try:
        deepspeed_config(resolve(config, world), world)
    except ConfigError as error:
        return error.problems
    return ()


def test_optimizer_and_scheduler_are_taken_over(tmp_path):
    tree = {
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": 2e-4, "betas": [0.8, 0.9], "eps": 1e-7, "weight_decay": 0.01},
        },
        "scheduler": {
            "type": "WarmupCosineLR",
            "params": {
                "total_num_steps": 19,
                "warmup_num_steps": 3,
                "warmup_type": "linear",
                "cos_min_ratio": 0.1,
            },
        },
        "activation_checkpointing": {"partition_activations": False, "number_checkpoints": 1},
        "zero_optimization": {"overlap_comm": True, "contiguous_gradients": True},
    }
    config, line = _read(tmp_path, tree)
    assert not line.problems
    train, parallel = config.train, config.parallel
    assert (train.lr, train.min_lr, train.lr_decay_style) == (2e-4, pytest.approx(2e-5), "cosine")
    assert (train.lr_warmup_iters, train.lr_decay_iters) == (3, 19)
    assert (train.adam_beta1, train.adam_beta2, train.adam_eps) == (0.8, 0.9, 1e-7)
    assert train.weight_decay == 0.01
    assert (parallel.recompute_granularity, parallel.recompute_num_layers) == ("full", 2)
    assert any("nothing to do for zero_optimization.overlap_comm" in t for t in line.translated)
    passed = deepspeed_config(resolve(config, 2), 2)
    assert passed["zero_optimization"]["overlap_comm"] is False
    assert passed["zero_optimization"]["contiguous_gradients"] is True
    assert not {"optimizer", "scheduler", "activation_checkpointing"} & passed.keys()


def test_all_that_is_wrong_with_a_json_is_told_at_once(tmp_path):
    tree = {
        "gradient_cliping": 1.0,
        "bf16": True,
        "optimizer": {"type": "Lamb"},
        "scheduler": {"type": "OneCycle", "params": {}},
        "zero_optimization": {
            "stage": 1,
            "ofload_optimizer": {},
            "offload_optimizer": {"device": "cpu"},
            "reduce_bucket_size": 10,
        },
        "elasticity": {"enabled": True},
        "hybrid_engine": {"enabled": False},
        "activation_checkpointing": {"cpu_checkpointing": True},
    }
    told = _read(tmp_path, tree)[1].problems
    for words in (
        "gradient_cliping is no setting of DeepSpeed, did you mean gradient_clipping?",
        "bf16 True, expected settings in {}",
        "optimizer.type 'Lamb', expected AdamW",
        "scheduler.type 'OneCycle', expected one of WarmupLR",
        "ofload_optimizer is no setting of DeepSpeed, did you mean zero_optimization.offload_opt",
        "offload_optimizer is not supported: offload of optimizer state",
        "elasticity is not supported: restarts are --max-restarts",
        "cpu_checkpointing is not supported",
    ):
        assert sum(words in problem for problem in told) == 1, (words, told)
    assert len(told) == 8


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"data_types": {"grad_accum_dtype": "int8"}}', "grad_accum_dtype 'int8', expected"),
        ('{"scheduler": {"type": "WarmupLR", "params": {}}}', "warmup_type is log"),
        ('{"optimizer": {"params": {"adam_w_mode": false}}}', "adam_w_mode"),
        ('{"train_batch_size": "many"}', "train_batch_size: found 'many', expected a whole"),
        ("[1]", "found list"),
        ("{", "no JSON"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, text, words):
    path = tmp_path / "ds.json"
    path.write_text(text)
    (told,) = read_config([*BARE, "--deepspeed_config", str(path)])[1].problems
    assert words in told and "\n" not in told


def test_every_key_of_the_table_has_one_meaning():
    keys = [*FIELDS_OF, *READ.split(), *PASSED_ON.split()]
    keys += [key for table in (NOTHING, MISSING) for text in table.values() for key in text.split()]
    assert len(keys) == len(set(keys))
    assert set(FIELDS_OF.values()) <= FIELDS.keys()


def test_the_file_reaches_deepspeed(tmp_path, dataset):
    """Buckets of 64 numbers reduce gradients in another order of calls, to the same losses."""
    path = tmp_path / "extra.json"
    path.write_text('{"zero_optimization": {"reduce_bucket_size": 64}, "prescale_gradients": true}')
    flags = [*TINY, "--data-path", dataset, "--zero-stage", "1", "--train-iters", "3"]
    plain = dist.run(train, 2, [*flags, "--run-dir", str(tmp_path / "a")])[0]
    more = ["--run-dir", str(tmp_path / "b"), "--deepspeed_config", str(path)]
    other = dist.run(train, 2, [*flags, *more])[0]
    assert [r["loss"] for r in other] == pytest.approx([r["loss"] for r in plain], rel=1e-5)
    # And a wrong file stops a run where DeepSpeed would read it.
    path.write_text('{"zero_optimization": {"reduce_bucket_size": "many"}}')
    with pytest.raises(RuntimeError, match="reduce_bucket_size"):
        dist.run(train, 2, [*flags, *more[2:], "--run-dir", str(tmp_path / "c")])
