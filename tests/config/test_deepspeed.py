"""DeepSpeed's dict: what the flags say, and what a file may add to it."""

from __future__ import annotations

import json

import pytest

from megasparse.config import load_config, resolve
from megasparse.config.deepspeed import deepspeed_config
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


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"train_batch_size": 64}', "train_batch_size 64, the run's flags say 4"),
        ('{"zero_optimization": {"stage": 2}}', "zero_optimization.stage 2"),
        ('{"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}', "offload_optimizer"),
        ('{"optimizer": {"type": "Adam"}}', "optimizer: megasparse has its own"),
        ('{"fp16": {"enabled": true}}', "expected --bf16"),
        ('{"bf16": true}', "bf16 True"),
        ("[1]", "found list"),
        ("{", "no JSON"),
    ],
)
def test_a_file_may_not_contradict_the_flags(tmp_path, text, words):
    with pytest.raises(ConfigError) as caught:
        deepspeed_config(_config(tmp_path, text), 2)
    assert words in str(caught.value) and "\n" not in str(caught.value)


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
