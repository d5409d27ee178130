"""The families of Hugging Face whose layers have experts.

The weights of an expert are tensors of their own there; here those of a layer's experts are stacked
(`{}` stands for the expert's number).
"""

from __future__ import annotations

from megasparse.convert.huggingface.config_keys import (
    Always,
    Head,
    Must,
    Number,
    Size,
    Switch,
    Written,
)
from megasparse.convert.huggingface.expert_keys import ExpertLayers, Experts
from megasparse.convert.huggingface.family import (
    ATTENTION_DROPOUT,
    GROUPS,
    LLAMA_MODULES,
    NO_BIAS,
    QK_NORMS,
    SIZES,
    SWIGLU,
    Family,
    tied,
    without,
)
from megasparse.convert.huggingface.layer_keys import Window
from megasparse.convert.huggingface.rope_keys import Rope

_DENSE = ("mlp.linear_fc1", "mlp.linear_fc2")
# The experts are as wide as `intermediate_size` says.
_ONE_WIDTH = Always({"moe_ffn_hidden_size": lambda f: f["ffn_hidden_size"]})
# Whether the chosen experts' probabilities are made to sum to 1.
_NORMED = Switch("moe_router_pre_softmax", "norm_topk_prob", False, inverted=True)
_EXPERT_MODULES: dict[str, str | tuple[str, ...]] = {
    "mlp.router": "mlp.gate",
    "mlp.experts.linear_fc1": ("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj"),
    "mlp.experts.linear_fc2": ("mlp.experts.{}.down_proj",),
}

MIXTRAL = Family(
    architecture="MixtralForCausalLM",
    model_type="mixtral",
    config=(
        *SWIGLU,
        *SIZES,
        Experts("num_local_experts", 8),
        Size("moe_router_topk", "num_experts_per_tok", 2),
        _ONE_WIDTH,
        Size("num_query_groups", "num_key_value_heads", 8),
        Head(),
        Size("max_position_embeddings", "max_position_embeddings", 4096 * 32),
        Rope(theta=1000000.0),
        Window(None),
        Number("norm_epsilon", "rms_norm_eps", 1e-5),
        NO_BIAS,
        tied(False),
        ATTENTION_DROPOUT,
        Written({"output_router_logits": False, "router_aux_loss_coef": 0.001}),
    ),
    prefix="model.",
    layers="model.layers.",
    modules=without(LLAMA_MODULES, *_DENSE)
    | {
        "mlp.router": "block_sparse_moe.gate",
        "mlp.experts.linear_fc1": (
            "block_sparse_moe.experts.{}.w1",
            "block_sparse_moe.experts.{}.w3",
        ),
        "mlp.experts.linear_fc2": ("block_sparse_moe.experts.{}.w2",),
    },
)

QWEN3_MOE = Family(
    architecture="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    config=(
        *SWIGLU,
        *SIZES,
        Experts("num_experts", 128),
        Size("moe_router_topk", "num_experts_per_tok", 8),
        Size("moe_ffn_hidden_size", "moe_intermediate_size", 768),
        ExpertLayers(),
        _NORMED,
        Size("num_query_groups", "num_key_value_heads", 4),
        Head(),
        Size("max_position_embeddings", "max_position_embeddings", 32768),
        Rope(),
        Window(4096, switched=True),  # its class knows no `layer_types`
        Number("norm_epsilon", "rms_norm_eps", 1e-6),
        Must("attention_bias", (False,), False),
        NO_BIAS,
        Always({"qk_layernorm": True}),
        tied(False),
        ATTENTION_DROPOUT,
        Written({"output_router_logits": False, "router_aux_loss_coef": 0.001}),
    ),
    prefix="model.",
    layers="model.layers.",
    modules=LLAMA_MODULES | QK_NORMS | _EXPERT_MODULES,
)

OLMOE = Family(
    architecture="OlmoeForCausalLM",
    model_type="olmoe",
    config=(
        *SWIGLU,
        *SIZES,
        Experts("num_experts", 64),
        Size("moe_router_topk", "num_experts_per_tok", 8),
        _ONE_WIDTH,
        _NORMED,
        GROUPS,
        Head(None),
        Size("max_position_embeddings", "max_position_embeddings", 4096),
        Rope(),
        Number("norm_epsilon", "rms_norm_eps", 1e-5),
        Must("attention_bias", (False,), False),
        Must("clip_qkv", (None,), None),
        NO_BIAS,
        Always({"qk_layernorm": True, "qk_layernorm_scope": "all"}),
        tied(False),
        ATTENTION_DROPOUT,
        Written({"output_router_logits": False, "router_aux_loss_coef": 0.01}),
    ),
    prefix="model.",
    layers="model.layers.",
    modules=without(LLAMA_MODULES, *_DENSE) | QK_NORMS | _EXPERT_MODULES,
)

EXPERT_FAMILIES = (MIXTRAL, QWEN3_MOE, OLMOE)
