"""The model families of Hugging Face that can be read and written: one entry each.

An entry says how `config.json` is read and written (rows, in the order in which they are read), and
what the family calls its tensors. `docs/extending.md` has how to add one.
"""

from __future__ import annotations

from megasparse.convert.huggingface.config_keys import (
    Always,
    Head,
    Must,
    Number,
    Same,
    Size,
    Switch,
    Written,
)
from megasparse.convert.huggingface.expert_families import EXPERT_FAMILIES
from megasparse.convert.huggingface.family import (
    ACTIVATIONS,
    ALL_HEADS,
    ATTENTION_DROPOUT,
    GROUPS,
    LLAMA_MODULES,
    NO_BIAS,
    QK_NORMS,
    SIZES,
    SWIGLU,
    VOCABULARY,
    Family,
    tied,
    without,
)
from megasparse.convert.huggingface.layer_keys import (
    Activation,
    NoRope,
    Window,
    WindowOfSome,
)
from megasparse.convert.huggingface.rope_keys import Rope

LLAMA = Family(
    architecture="LlamaForCausalLM",
    model_type="llama",
    config=(
        *SWIGLU,
        *SIZES,
        GROUPS,
        Head(),
        Size("max_position_embeddings", "max_position_embeddings", 2048),
        Rope(),
        Number("norm_epsilon", "rms_norm_eps", 1e-6),
        Switch("disable_bias_linear", "attention_bias", False, inverted=True),
        Switch("disable_bias_linear", "mlp_bias", False, inverted=True),
        tied(False),
        ATTENTION_DROPOUT,
    ),
    prefix="model.",
    layers="model.layers.",
    modules=LLAMA_MODULES,
)

GPT2 = Family(
    architecture="GPT2LMHeadModel",
    model_type="gpt2",
    config=(
        Activation("activation_function", "gelu_new", ACTIVATIONS),
        Must("scale_attn_weights", (True,), True, written=False),
        Must("scale_attn_by_inverse_layer_idx", (False,), False, written=False),
        Must("add_cross_attention", (False,), False, written=False),
        Size("hidden_size", "n_embd"),
        Size("num_attention_heads", "n_head"),
        Head(None, "n_embd", "n_head"),
        ALL_HEADS,
        Size("num_layers", "n_layer"),
        Size("ffn_hidden_size", "n_inner", lambda f: 4 * f["hidden_size"]),
        Size("max_position_embeddings", "n_positions", 1024),
        Number("norm_epsilon", "layer_norm_epsilon", 1e-5),
        tied(True),
        VOCABULARY,
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

MISTRAL = Family(
    architecture="MistralForCausalLM",
    model_type="mistral",
    config=(
        *SWIGLU,
        *SIZES,
        Size("num_query_groups", "num_key_value_heads", 8),
        Head(),
        Size("max_position_embeddings", "max_position_embeddings", 4096 * 32),
        Rope(),
        Window(4096),
        Number("norm_epsilon", "rms_norm_eps", 1e-6),
        NO_BIAS,
        tied(False),
        ATTENTION_DROPOUT,
    ),
    prefix="model.",
    layers="model.layers.",
    modules=LLAMA_MODULES,
)

QWEN2 = Family(
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    config=(
        *SWIGLU,
        *SIZES,
        Size("num_query_groups", "num_key_value_heads", 32),
        Head(None),
        Size("max_position_embeddings", "max_position_embeddings", 32768),
        Rope(),
        WindowOfSome(4096, "max_window_layers"),
        Number("norm_epsilon", "rms_norm_eps", 1e-6),
        NO_BIAS,
        Always({"add_qkv_bias": True}),
        tied(False),
        ATTENTION_DROPOUT,
    ),
    prefix="model.",
    layers="model.layers.",
    modules=LLAMA_MODULES,
)

QWEN3 = Family(
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    config=(
        *SWIGLU,
        *SIZES,
        Size("num_query_groups", "num_key_value_heads", 32),
        Size("kv_channels", "head_dim", 128),
        Size("max_position_embeddings", "max_position_embeddings", 32768),
        Rope(),
        WindowOfSome(4096, "max_window_layers"),
        Number("norm_epsilon", "rms_norm_eps", 1e-6),
        Must("attention_bias", (False,), False),
        NO_BIAS,
        Always({"qk_layernorm": True}),
        tied(False),
        ATTENTION_DROPOUT,
    ),
    prefix="model.",
    layers="model.layers.",
    modules=LLAMA_MODULES | QK_NORMS,
)

OLMO2 = Family(
    architecture="Olmo2ForCausalLM",
    model_type="olmo2",
    config=(
        *SWIGLU,
        *SIZES,
        GROUPS,
        Head(None),
        Size("max_position_embeddings", "max_position_embeddings", 2048),
        Rope(),
        Number("norm_epsilon", "rms_norm_eps", 1e-5),
        Must("attention_bias", (False,), False),
        NO_BIAS,
        Always({"qk_layernorm": True, "qk_layernorm_scope": "all", "norm_placement": "post"}),
        tied(False),
        ATTENTION_DROPOUT,
    ),
    prefix="model.",
    layers="model.layers.",
    modules=without(LLAMA_MODULES, "input_layernorm", "pre_mlp_layernorm")
    | QK_NORMS
    | {
        "post_self_attn_layernorm": "post_attention_layernorm",
        "post_mlp_layernorm": "post_feedforward_layernorm",
    },
)

SMOLLM3 = Family(
    architecture="SmolLM3ForCausalLM",
    model_type="smollm3",
    config=(
        *SWIGLU,
        *SIZES,
        Size("num_query_groups", "num_key_value_heads", 4),
        Head(None),
        Size("max_position_embeddings", "max_position_embeddings", 32768),
        Rope(theta=2000000.0),
        NoRope(),
        WindowOfSome(None, "no_rope"),
        Number("norm_epsilon", "rms_norm_eps", 1e-6),
        Switch("disable_bias_linear", "attention_bias", False, inverted=True),
        Switch("disable_bias_linear", "mlp_bias", False, inverted=True),
        tied(True),
        ATTENTION_DROPOUT,
    ),
    prefix="model.",
    layers="model.layers.",
    modules=LLAMA_MODULES,
)

PHI3 = Family(
    architecture="Phi3ForCausalLM",
    model_type="phi3",
    config=(
        *SWIGLU,
        *SIZES,
        GROUPS,
        Head(None),
        Size("max_position_embeddings", "max_position_embeddings", 4096),
        Rope(percent=1.0),
        Window(None),
        Number("norm_epsilon", "rms_norm_eps", 1e-5),
        NO_BIAS,
        tied(False),
        Written({"attention_dropout": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}),
    ),
    prefix="model.",
    layers="model.layers.",
    modules=LLAMA_MODULES
    | {
        "self_attention.linear_qkv": "self_attn.qkv_proj",
        "mlp.linear_fc1": "mlp.gate_up_proj",
    },
)

GPT_NEOX = Family(
    architecture="GPTNeoXForCausalLM",
    model_type="gpt_neox",
    config=(
        Activation("hidden_act", "gelu", ACTIVATIONS),
        Must("attention_bias", (True,), True),
        *SIZES,
        Head(None),
        ALL_HEADS,
        Size("max_position_embeddings", "max_position_embeddings", 2048),
        Rope(theta_key="rotary_emb_base", percent=0.25, percent_key="rotary_pct"),
        Number("norm_epsilon", "layer_norm_eps", 1e-5),
        Switch("parallel_residual", "use_parallel_residual", True),
        tied(False),
        Written({"attention_dropout": 0.0, "hidden_dropout": 0.0}),
    ),
    prefix="gpt_neox.",
    layers="gpt_neox.layers.",
    modules={
        "embedding.word_embeddings": "gpt_neox.embed_in",
        "decoder.final_layernorm": "gpt_neox.final_layer_norm",
        "output_layer": "embed_out",
        "input_layernorm": "input_layernorm",
        "pre_mlp_layernorm": "post_attention_layernorm",
        "self_attention.linear_qkv": "attention.query_key_value",
        "self_attention.linear_proj": "attention.dense",
        "mlp.linear_fc1": "mlp.dense_h_to_4h",
        "mlp.linear_fc2": "mlp.dense_4h_to_h",
    },
    fused_qkv="by group",
)

OPT = Family(
    architecture="OPTForCausalLM",
    model_type="opt",
    config=(
        Activation("activation_function", "relu", ACTIVATIONS),
        Must("do_layer_norm_before", (True,), True),
        Must("_remove_final_layer_norm", (False,), False),
        Must("layer_norm_elementwise_affine", (True,), True),
        Size("num_layers", "num_hidden_layers", 12),
        Size("hidden_size", "hidden_size", 768),
        Same("hidden_size", "word_embed_proj_dim"),
        Size("ffn_hidden_size", "ffn_dim", 3072),
        Size("num_attention_heads", "num_attention_heads", 12),
        Head(None),
        ALL_HEADS,
        Size("max_position_embeddings", "max_position_embeddings", 2048),
        Switch("disable_bias_linear", "enable_bias", True, inverted=True),
        tied(True),
        VOCABULARY,
        Written({"attention_dropout": 0.0, "dropout": 0.0, "layerdrop": 0.0}),
    ),
    prefix="model.",
    layers="model.decoder.layers.",
    modules={
        "embedding.word_embeddings": "model.decoder.embed_tokens",
        "embedding.position_embeddings": "model.decoder.embed_positions",
        "decoder.final_layernorm": "model.decoder.final_layer_norm",
        "output_layer": "lm_head",
        "input_layernorm": "self_attn_layer_norm",
        "pre_mlp_layernorm": "final_layer_norm",
        "self_attention.linear_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "self_attention.linear_proj": "self_attn.out_proj",
        "mlp.linear_fc1": "fc1",
        "mlp.linear_fc2": "fc2",
    },
    first_position=2,
)

STARCODER2 = Family(
    architecture="Starcoder2ForCausalLM",
    model_type="starcoder2",
    config=(
        Activation("hidden_act", "gelu_pytorch_tanh", ACTIVATIONS),
        *SIZES,
        Size("num_query_groups", "num_key_value_heads", 2),
        Head(None),
        Size("max_position_embeddings", "max_position_embeddings", 4096),
        Rope(),
        Window(None),
        Number("norm_epsilon", "norm_epsilon", 1e-5),
        Switch("disable_bias_linear", "use_bias", True, inverted=True),
        tied(True),
        Written({"attention_dropout": 0.0, "embedding_dropout": 0.0, "residual_dropout": 0.0}),
    ),
    prefix="model.",
    layers="model.layers.",
    modules=LLAMA_MODULES | {"mlp.linear_fc1": "mlp.c_fc", "mlp.linear_fc2": "mlp.c_proj"},
)

# In the order in which one is looked for that computes a model.
FAMILIES = {
    family.architecture: family
    for family in (
        LLAMA,
        GPT2,
        MISTRAL,
        QWEN2,
        QWEN3,
        OLMO2,
        SMOLLM3,
        PHI3,
        GPT_NEOX,
        OPT,
        STARCODER2,
        *EXPERT_FAMILIES,
    )
}
