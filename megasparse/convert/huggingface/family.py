"""What an entry of the table of families is made of, and the parts that several families share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from megasparse.convert.huggingface.config_keys import (
    Always,
    Must,
    Row,
    Size,
    Switch,
    Written,
)

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
            tensors are fused here: Q, K and V; gate and up. `{}`: of every expert one.
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


def without(modules: Modules, *names: str) -> dict[str, str | tuple[str, ...]]:
    """The modules but for some of ours."""
    return {ours: theirs for ours, theirs in modules.items() if ours not in names}


def tied(default: bool) -> Switch:
    """Whether the output layer has the embedding's weights."""
    name = "untie_embeddings_and_output_weights"
    return Switch(name, "tie_word_embeddings", default, inverted=True)


VOCABULARY = Size("vocab_size", "vocab_size")
# Sizes by the names that most families have.
SIZES = (
    Size("num_layers", "num_hidden_layers"),
    Size("hidden_size", "hidden_size"),
    Size("ffn_hidden_size", "intermediate_size"),
    Size("num_attention_heads", "num_attention_heads"),
    VOCABULARY,
)
GROUPS = Size("num_query_groups", "num_key_value_heads", lambda f: f["num_attention_heads"])
ALL_HEADS = Always({"num_query_groups": lambda f: f["num_attention_heads"]})
ACTIVATIONS = {
    "gelu_new": None,
    "gelu_pytorch_tanh": None,
    "gelu_fast": None,
    "gelu": "exact_gelu",
    "relu": "relu",
    "relu2": "squared_relu",
}
SWIGLU = (
    Must("hidden_act", ("silu", "swish"), "silu"),
    Always({"swiglu": True, "normalization": "RMSNorm"}),
)
LLAMA_MODULES: dict[str, str | tuple[str, ...]] = {
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

ATTENTION_DROPOUT = Written({"attention_dropout": 0.0})
NO_BIAS = Always({"disable_bias_linear": True})

QK_NORMS: dict[str, str | tuple[str, ...]] = {
    "self_attention.q_layernorm": "self_attn.q_norm",
    "self_attention.k_layernorm": "self_attn.k_norm",
}
