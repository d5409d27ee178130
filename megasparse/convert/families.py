"""The model families of Hugging Face that can be read and written: one entry each.

An entry says how `config.json` is read and written (rows, in the order in which they are read), and
what the family calls its tensors. `docs/extending.md` has how to add one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from megasparse.convert.config_keys import Always, Head, Must, Number, Row, Size, Switch, Written
from megasparse.convert.rope_keys import Rope

# How Q, K and V lie in a tensor that holds them all: one after the other, or as here, by group.
Fused = Literal["one after the other", "by group"]
# Modules of ours to theirs.
Modules = Mapping[str, str | tuple[str, ...]]


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        architecture: the class, as `config.json` names it.
        model_type: as `config.json` names it.
        config: rows of its keys.
        prefix: before the names of all tensors but the output layer's; older files of a base model
            lack it.
        layers: before the number of a layer.
        modules: for each module of ours (within its layer) the one of theirs, or the several whose
            tensors are fused here: Q, K and V; gate and up.
        fused_qkv: the order within a tensor of Q, K and V.
        transposed: matrices of layers are stored `(in, out)`.
        first_position: row of the table of positions that position 0 has.
    """

    architecture: str
    model_type: str
    config: tuple[Row, ...]
    prefix: str
    layers: str
    modules: Modules
    fused_qkv: Fused = "one after the other"
    transposed: bool = False
    first_position: int = 0


def _tied(default: bool) -> Switch:
    name = "untie_embeddings_and_output_weights"
    return Switch(name, "tie_word_embeddings", default, inverted=True)


_VOCABULARY = Size("vocab_size", "vocab_size")
# Sizes by the names that most families have.
_SIZES = (
    Size("num_layers", "num_hidden_layers"),
    Size("hidden_size", "hidden_size"),
    Size("ffn_hidden_size", "intermediate_size"),
    Size("num_attention_heads", "num_attention_heads"),
    _VOCABULARY,
)
_GROUPS = Size("num_query_groups", "num_key_value_heads", lambda f: f["num_attention_heads"])
_ALL_HEADS = Always({"num_query_groups": lambda f: f["num_attention_heads"]})
_SWIGLU = (
    Must("hidden_act", ("silu", "swish"), "silu"),
    Always({"swiglu": True, "normalization": "RMSNorm"}),
)
_LLAMA_MODULES: Modules = {
    "embedding.word_embeddings": "model.embed_tokens",
    "decoder.final_layernorm": "model.norm",
    "output_layer": "lm_head",
    "input_layernorm": "input_layernorm",
    "pre_mlp_layernorm": "post_attention_layernorm",
    "self_attention.linear_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention.linear_proj": "self_attn.o_proj",
    "mlp.linear_fc1": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.linear_fc2": "mlp.down_proj",
}

LLAMA = Family(
    architecture="LlamaForCausalLM",
    model_type="llama",
    config=(
        *_SWIGLU,
        *_SIZES,
        _GROUPS,
        Head(),
        Size("max_position_embeddings", "max_position_embeddings", 2048),
        Rope(),
        Number("norm_epsilon", "rms_norm_eps", 1e-6),
        Switch("disable_bias_linear", "attention_bias", False, inverted=True),
        Switch("disable_bias_linear", "mlp_bias", False, inverted=True),
        _tied(False),
        Written({"attention_dropout": 0.0}),
    ),
    prefix="model.",
    layers="model.layers.",
    modules=_LLAMA_MODULES,
)

GPT2 = Family(
    architecture="GPT2LMHeadModel",
    model_type="gpt2",
    config=(
        Must("activation_function", ("gelu_new", "gelu_pytorch_tanh"), "gelu_new"),
        Must("scale_attn_weights", (True,), True, written=False),
        Must("scale_attn_by_inverse_layer_idx", (False,), False, written=False),
        Must("add_cross_attention", (False,), False, written=False),
        Size("hidden_size", "n_embd"),
        Size("num_attention_heads", "n_head"),
        Head(None, "n_embd", "n_head"),
        _ALL_HEADS,
        Size("num_layers", "n_layer"),
        Size("ffn_hidden_size", "n_inner", lambda f: 4 * f["hidden_size"]),
        Size("max_position_embeddings", "n_positions", 1024),
        Number("norm_epsilon", "layer_norm_epsilon", 1e-5),
        _tied(True),
        _VOCABULARY,
        Written({"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}),
    ),
    prefix="transformer.",
    layers="transformer.h.",
    modules={
        "embedding.word_embeddings": "transformer.wte",
        "embedding.position_embeddings": "transformer.wpe",
        "decoder.final_layernorm": "transformer.ln_f",
        "output_layer": "lm_head",
        "input_layernorm": "ln_1",
        "pre_mlp_layernorm": "ln_2",
        "self_attention.linear_proj": "attn.c_proj",
        "self_attention.linear_qkv": "attn.c_attn",
        "mlp.linear_fc1": "mlp.c_fc",
        "mlp.linear_fc2": "mlp.c_proj",
    },
    transposed=True,
)

# In the order in which one is looked for that computes a model.
FAMILIES = {family.architecture: family for family in (LLAMA, GPT2)}
