"""What a `config.json` says, and what it means where it says nothing."""

from __future__ import annotations

import pytest
import transformers

from megasparse.convert.huggingface.architecture import model_config
from megasparse.errors import CheckpointError

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 128,
}
ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_what_a_llama_does_not_say_is_as_transformers_has_it():
    model = model_config(LLAMA, "config.json")
    theirs = transformers.LlamaConfig(**LLAMA)
    assert model.norm_epsilon == theirs.rms_norm_eps == 1e-6
    assert model.max_position_embeddings == theirs.max_position_embeddings
    assert model.num_query_groups == theirs.num_key_value_heads
    assert model.untie_embeddings_and_output_weights != theirs.tie_word_embeddings
    assert model.disable_bias_linear and not (theirs.attention_bias or theirs.mlp_bias)
    assert model.rotary_base == 10000 and not model.use_rope_scaling


@pytest.mark.parametrize(("attention", "mlp"), [(True, False), (False, True)])
def test_biases_of_attention_and_mlp_go_together(attention, mlp):
    with pytest.raises(CheckpointError, match=f"mlp_bias: found {mlp}, expected {attention}"):
        model_config({**LLAMA, "attention_bias": attention, "mlp_bias": mlp}, "config.json")
    both = {**LLAMA, "attention_bias": True, "mlp_bias": True}
    assert not model_config(both, "config.json").disable_bias_linear


@pytest.mark.parametrize("kind", ["rope_type", "type"])
def test_scaling_of_positions_in_the_form_before_version_5(kind):
    model = model_config({**LLAMA, "rope_scaling": {kind: "llama3", **ROPE}}, "config.json")
    assert model.use_rope_scaling and model.rope_scaling_factor == 8.0
    with pytest.raises(CheckpointError, match="rope_type: found 'linear', expected 'llama3'"):
        model_config({**LLAMA, "rope_scaling": {kind: "linear", "factor": 2.0}}, "config.json")


def test_what_a_gpt2_does_not_say_is_as_transformers_has_it():
    config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": 128}
    config |= {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 32}
    model, theirs = model_config(config, "config.json"), transformers.GPT2Config(**config)
    assert model.norm_epsilon == theirs.layer_norm_epsilon
    assert theirs.scale_attn_weights and not theirs.scale_attn_by_inverse_layer_idx
    assert model.ffn_hidden_size == 4 * 64 and model.normalization == "LayerNorm"
    with pytest.raises(CheckpointError, match="scale_attn_weights: found False, expected True"):
        model_config({**config, "scale_attn_weights": False}, "config.json")
