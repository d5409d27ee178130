"""Megatron's notation of windows and patterns of layers: every spelling has one text."""

from __future__ import annotations

import random

import pytest

from megasparse.config import load_config, resolve
from megasparse.config.layer_patterns import layers_of, pattern_of, pattern_text, window_text
from megasparse.errors import ConfigError

BASE = ["--mock-data", "--vocab-size", "128", "--num-layers", "4"]
ROPE = ["--position-embedding-type", "rope"]


@pytest.mark.parametrize("value", ["4095,0", "(4095, 0)", "[4095,0]", (4095, 0), [4095, 0]])
def test_windows(value):
    assert window_text(value) == "4095,0"


@pytest.mark.parametrize("value", ["4095", "-1,0", "7,3", "a,0", "1,0,0", "", None, True, [1.5, 0]])
def test_what_is_no_window(value):
    with pytest.raises(ValueError):
        window_text(value)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (4, "4"), ("4", "4"), ([0, 1], "[0,1]"), ("([1]*2+[0])*2", "[1,1,0,1,1,0]"),
        ("[0, 1]+[1]", "[0,1,1]"), ("2*[0]", "[0,0]"),
    ],
)  # fmt: skip
def test_patterns(value, text):
    assert pattern_text(value) == text == pattern_text(text)


@pytest.mark.parametrize(
    "value", ["0", "-1", "[]", "[2]", "[[0]]", "__import__('os')", "[1]*10**9", "1.5", "", True,
              "[0]*100000", "1+[0]", "(" * 500],
)  # fmt: skip
def test_what_is_no_pattern(value):
    with pytest.raises(ValueError):
        pattern_text(value)


def test_a_pattern_of_layers_is_read_as_those_layers():
    generator = random.Random(0)
    for _ in range(300):
        layers = [generator.random() < 0.5 for _ in range(generator.randint(1, 9))]
        for nth in (False, True):
            assert layers_of(pattern_of(layers, nth), len(layers), nth) == layers
    assert pattern_of([True, True, False] * 2, nth=False) == "3"
    assert pattern_of([False] * 3 + [True], nth=True) == "4"


def test_which_layers():
    flags = [*ROPE, "--window-size", "(7, 0)", "--window-attn-skip-freq", "[1,0]*2"]
    model = resolve(load_config([*BASE, *flags, "--no-rope-freq", "2"]), 1).model
    assert model.window == 8 and model.windowed_layers == [True, False, True, False]
    assert model.layers_without_rope == [False, True, False, True]
    assert resolve(load_config(BASE), 1).model.windowed_layers == [False] * 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--window-size", "7"], "window_size|window-size.*'7'.*tokens before and after"),
        (["--window-attn-skip-freq", "2"], "window_attn_skip_freq 2 needs window_size"),
        (["--window-size", "7,0", "--window-attn-skip-freq", "[1,0]"], "has 2 items, expected"),
        (["--no-rope-freq", "4"], "no_rope_freq 4 needs position_embedding_type rope"),
        ([*ROPE, "--no-rope-freq", "[1]"], "no_rope_freq has 1 items, expected num_layers 4"),
        (["--qk-layernorm-scope", "all"], "qk_layernorm_scope all needs qk_layernorm"),
        (
            ["--qk-layernorm", "--qk-layernorm-scope", "all"],
            "all needs normalization RMSNorm, found LayerNorm",
        ),
        (["--parallel-residual", "--norm-placement", "post"], "parallel_residual needs norm_pl"),
        ([*ROPE, "--rotary-percent", "0.52"], "rotary_percent 0.52 of kv_channels 64"),
        (["--relu", "--exact-gelu"], "relu and exact_gelu are both set"),
    ],
)
def test_what_does_not_go_together_is_told(flags, message):
    if "0.52" in flags:
        flags = [*flags, "--kv-channels", "64"]
    with pytest.raises(ConfigError, match=message):
        resolve(load_config([*BASE, *flags]), 1)
