"""Megatron's arguments as a model: what is said, what is meant without, what is refused."""

from __future__ import annotations

import pytest

from megasparse.convert.megatron.arguments import (
    complete_model,
    megatron_arguments,
    megatron_config,
)
from megasparse.errors import CheckpointError, ConfigError

LEAST = {
    "num_layers": 4, "hidden_size": 24, "ffn_hidden_size": 40, "num_attention_heads": 6,
    "max_position_embeddings": 128,
}  # fmt: skip


OFF = (
    "use_rope_scaling", "swiglu", "squared_relu", "exact_gelu", "add_qkv_bias", "qk_layernorm",
    "disable_bias_linear", "untie_embeddings_and_output_weights",
)  # fmt: skip
REFUSED = (
    "quick_geglu", "apply_layernorm_1p", "rotary_interleaved", "qk_l2_norm", "num_experts",
    "rotary_seq_len_interpolation_factor", "apply_residual_connection_post_layernorm",
)  # fmt: skip


def model(**more):
    return megatron_config({**LEAST, **more}, "file")


def test_what_is_not_said_is_megatrons_default():
    found = model()
    sizes = (found.num_query_groups, found.kv_channels, found.seq_length)
    assert sizes == (6, 4, 128) and not found.group_query_attention
    assert (found.position_embedding_type, found.normalization) == ("learned_absolute", "LayerNorm")
    assert (found.rotary_base, found.rotary_percent, found.rope_scaling_factor) == (10000, 1.0, 8.0)
    assert found.norm_epsilon == 1e-5 and found.window_size is None
    for name in OFF:
        assert getattr(found, name) is False, name


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"num_key_value_heads": 2}, {"num_query_groups": 2, "group_query_attention": True}),
        (
            {"group_query_attention": True, "num_query_groups": 3, "num_key_value_heads": 2},
            {"num_query_groups": 3},
        ),
        ({"num_query_groups": 3}, {"num_query_groups": 6}),
        ({"kv_channels": 7}, {"kv_channels": 7}),
        ({"seq_length": 64}, {"seq_length": 64, "max_position_embeddings": 128}),
        ({"use_rotary_position_embeddings": True}, {"position_embedding_type": "rope"}),
        ({"position_embedding_type": "rope"}, {"position_embedding_type": "rope"}),
        ({"rotary_base": 5000, "rope_theta": 7}, {"rotary_base": 5000}),
        ({"rope_theta": 7000.0}, {"rotary_base": 7000}),
        ({"normalization": "RMSNorm"}, {"normalization": "RMSNorm"}),
        ({"norm_epsilon": 1e-6, "layernorm_epsilon": 1e-3}, {"norm_epsilon": 1e-6}),
        ({"layernorm_epsilon": 1e-3}, {"norm_epsilon": 1e-3}),
        ({"add_bias_linear": False}, {"disable_bias_linear": True}),
        ({"disable_bias_linear": True}, {"disable_bias_linear": True}),
        ({"disable_bias_linear": True, "add_bias_linear": True}, {"disable_bias_linear": False}),
        ({"bias_gelu_fusion": False}, {"exact_gelu": True}),
        ({"bias_gelu_fusion": True}, {"exact_gelu": False}),
        ({"bias_gelu_fusion": False, "swiglu": True}, {"exact_gelu": False, "swiglu": True}),
        ({"bias_gelu_fusion": False, "openai_gelu": True}, {"exact_gelu": False}),
        ({"window_size": (7, 0)}, {"window_size": "7,0"}),
        ({"no_rope_freq": 4}, {"no_rope_freq": "4"}),
        ({"use_rope_scaling": True, "rope_scaling_factor": 32}, {"rope_scaling_factor": 32.0}),
    ],
)
def test_what_is_said_is_taken(said, expected):
    found = model(**said)
    assert {name: getattr(found, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("said", "name"),
    [
        *(({name: True}, name) for name in REFUSED),
        ({"position_embedding_type": "mrope"}, "position_embedding_type"),
        ({"softmax_type": "learnable"}, "softmax_type"),
    ],
)
def test_what_no_layer_here_computes_is_refused_by_name(said, name):
    with pytest.raises(ConfigError, match=f"file: args: {name} .* is not what megasparse"):
        model(**said)


def test_what_is_off_is_not_refused():
    assert model(**dict.fromkeys(REFUSED, False), softmax_type="vanilla") == model()


def test_sizes_are_whole_numbers_above_zero():
    for name in LEAST:
        for odd in (None, 0, True, "4"):
            found = "seq_length" if name == "max_position_embeddings" else name
            with pytest.raises(CheckpointError, match=f"file: args: found no {found}"):
                model(**{name: odd})
    with pytest.raises(ConfigError, match="file: args: window_size: found 'x', expected"):
        model(window_size="x")
    assert model(num_layers=1).num_layers == 1
    with pytest.raises(CheckpointError, match="found no max_position_embeddings"):
        model(seq_length=8, max_position_embeddings=None)


def test_a_vocabulary_is_what_is_asked_for_or_said_or_there():
    def words(stated=None, asked=None):
        return complete_model({**LEAST, "vocab_size": stated}, 64, asked, "file").vocab_size

    assert [words(), words(50), words(64), words(65), words(0), words("50")] == [
        64,
        50,
        64,
        64,
        64,
        64,
    ]
    assert words(50, 60) == 60 and words(1) == 1
    assert words(asked=64) == 64
    with pytest.raises(ConfigError, match="vocab_size 65 is more than the 64 rows of file"):
        words(asked=65)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"bias_gelu_fusion": False, "add_qkv_bias": True, "untie_embeddings_and_output_weights": 1},
        {"swiglu": True, "add_bias_linear": False, "num_key_value_heads": 2, "qk_layernorm": True},
        {"position_embedding_type": "rope", "no_rope_freq": [0, 0, 1, 1], "rotary_percent": 0.5},
        {"window_size": (7, 0), "window_attn_skip_freq": 2, "normalization": "RMSNorm"},
    ],
)
def test_arguments_that_are_written_are_read_again(more):
    found = complete_model({**LEAST, **more}, 64, 50, "file")
    written = megatron_arguments(found, 64)
    assert written["padded_vocab_size"] == 64 and written["vocab_size"] == 50
    assert complete_model(written, 64, None, "file") == found
    found.geglu = True
    with pytest.raises(ConfigError, match="do not compute this model: geglu is True"):
        megatron_arguments(found, 64)
