"""Every key of every family against transformers' own class of it: what a file that does not say a
key means, what a file that says it means, what is written, and the tensors' names and shapes."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch
import transformers

from megasparse.convert.huggingface.architecture import huggingface_config, model_config
from megasparse.convert.huggingface.families import FAMILIES
from megasparse.convert.huggingface.layout import rules
from megasparse.errors import CheckpointError

LLAMA, GPT2, NEOX, OPT = (
    "LlamaForCausalLM",
    "GPT2LMHeadModel",
    "GPTNeoXForCausalLM",
    "OPTForCausalLM",
)
QWEN2, QWEN3, QWEN3_MOE = "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM"
OLMO2, OLMOE, SMOLLM3 = "Olmo2ForCausalLM", "OlmoeForCausalLM", "SmolLM3ForCausalLM"
MISTRAL, MIXTRAL, PHI3 = "MistralForCausalLM", "MixtralForCausalLM", "Phi3ForCausalLM"
STARCODER2 = "Starcoder2ForCausalLM"
AUXILIARY = "router_aux_loss_coef"
WITH_EXPERTS = (MIXTRAL, QWEN3_MOE, OLMOE)
WITHOUT_GATE = (GPT2, NEOX, OPT, STARCODER2)
LAYER_NORM = WITHOUT_GATE
LEARNED_POSITIONS = (GPT2, OPT)
WITH_BIASES = (LLAMA, SMOLLM3)  # if the file says so
ALL_HEADS = (GPT2, NEOX, OPT)  # keys and values of their own for every head

# What a file of the family has to say.
NEEDED = {
    GPT2: ("n_embd", "n_head", "n_layer", "vocab_size"),
    OPT: ("vocab_size",),
    "others": (
        "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers",
        "vocab_size",
    ),
}  # fmt: skip
# Sizes of which no two are equal.
SMALL = {
    "vocab_size": 131, "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 72,
    "pad_token_id": 0,
}  # fmt: skip
GROUPS = "num_key_value_heads"
OWN_SIZES = {
    GPT2: {"n_inner": 56}, OPT: {"ffn_dim": 56, "word_embed_proj_dim": 40},
    QWEN3: {"head_dim": 12}, LLAMA: {"head_dim": 12}, MISTRAL: {"head_dim": 12},
    QWEN3_MOE: {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 3},
    MIXTRAL: {"num_local_experts": 4, "num_experts_per_tok": 3},
    OLMOE: {"num_experts": 4, "num_experts_per_tok": 3},
}  # fmt: skip


def config_of(architecture: str, **said: Any) -> Any:
    """transformers' own configuration of a family."""
    return transformers.CONFIG_MAPPING[FAMILIES[architecture].model_type](**said)


def small(architecture: str, **said: Any) -> Any:
    """A configuration of small sizes, none of them the class's own."""
    sizes = {k: v for k, v in SMALL.items() if k != GROUPS or architecture not in ALL_HEADS}
    return config_of(architecture, **sizes | OWN_SIZES.get(architecture, {}) | said)


def file_of(architecture: str, theirs: Any) -> dict[str, Any]:
    return {**theirs.to_dict(), "architectures": [architecture]}


def _first(theirs: Any, *names: str, default: Any = None) -> Any:
    """Of the keys that the family has the first that is not null."""
    found = (getattr(theirs, name, None) for name in names)
    return next((value for value in found if value is not None), default)


def meaning(architecture: str, theirs: Any) -> dict[str, Any]:
    """Our settings, by what transformers documents and computes."""
    heads, hidden = theirs.num_attention_heads, theirs.hidden_size
    biases = [_first(theirs, n) for n in ("use_bias", "enable_bias", "attention_bias", "mlp_bias")]
    found = {
        "num_layers": theirs.num_hidden_layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "vocab_size": theirs.vocab_size,
        "ffn_hidden_size": _first(
            theirs, "intermediate_size", "ffn_dim", "n_inner", default=4 * hidden
        ),
        "max_position_embeddings": theirs.max_position_embeddings,
        "num_query_groups": _first(theirs, "num_key_value_heads", default=heads),
        "kv_channels": _first(theirs, "head_dim", default=hidden // heads),
        "norm_epsilon": _first(
            theirs,
            "rms_norm_eps",
            "layer_norm_epsilon",
            "layer_norm_eps",
            "norm_epsilon",
            default=1e-5,  # of torch's LayerNorm
        ),
        "normalization": "LayerNorm" if architecture in LAYER_NORM else "RMSNorm",
        "untie_embeddings_and_output_weights": not theirs.tie_word_embeddings,
        "disable_bias_linear": architecture != GPT2 and not any(biases),
        "add_qkv_bias": architecture == QWEN2,
        "qk_layernorm": architecture in (QWEN3, QWEN3_MOE, OLMO2, OLMOE),
        "qk_layernorm_scope": "all" if architecture in (OLMO2, OLMOE) else "head",
        "norm_placement": "post" if architecture == OLMO2 else "pre",
        "parallel_residual": bool(_first(theirs, "use_parallel_residual")),
        "swiglu": architecture not in WITHOUT_GATE,
        "geglu": False,
        "position_embedding_type": "rope",
        "num_experts": None,
    }
    activation = _first(theirs, "hidden_act", "activation_function")
    found |= {
        "exact_gelu": activation == "gelu",
        "relu": activation == "relu",
        "squared_relu": activation == "relu2",
    }
    if architecture in LEARNED_POSITIONS:
        found["position_embedding_type"] = "learned_absolute"
    else:
        rope = theirs.rope_parameters
        found["rotary_base"] = rope["rope_theta"]
        found["rotary_percent"] = rope.get("partial_rotary_factor", 1.0)
        found["use_rope_scaling"] = False
    window = _first(theirs, "sliding_window")
    found["window_size"] = None if window is None else f"{window - 1},0"
    if architecture in WITH_EXPERTS:
        found |= {
            "num_experts": _first(theirs, "num_local_experts", "num_experts"),
            "moe_router_topk": theirs.num_experts_per_tok,
            "moe_ffn_hidden_size": _first(theirs, "moe_intermediate_size", "intermediate_size"),
            "moe_router_pre_softmax": architecture != MIXTRAL and not theirs.norm_topk_prob,
        }
    return found


def settings(model: Any, of: dict[str, Any]) -> dict[str, Any]:
    return {name: getattr(model, name) for name in of}


@pytest.mark.parametrize("architecture", FAMILIES)
def test_what_a_file_does_not_say_is_what_the_class_has(architecture):
    theirs = config_of(architecture)
    bare = {"architectures": [architecture]}
    bare |= {key: getattr(theirs, key) for key in NEEDED.get(architecture, NEEDED["others"])}
    wanted = meaning(architecture, theirs)
    model = model_config(bare, "config.json")
    assert settings(model, wanted) == wanted
    # And of a file that says everything.
    assert asdict(model_config(file_of(architecture, theirs), "config.json")) == asdict(model)
    assert model.seq_length == min(4096, theirs.max_position_embeddings)
    for key in set(bare) - {"architectures"}:
        less = {name: value for name, value in bare.items() if name != key}
        with pytest.raises(CheckpointError, match=f"{key}: found nothing"):
            model_config(less, "config.json")


@pytest.mark.parametrize("architecture", FAMILIES)
def test_what_a_file_says_is_what_the_class_makes_of_it(architecture):
    """Of values of which none is a default: each size another, each switch the other way."""
    default = config_of(architecture)
    switches = ("tie_word_embeddings", "use_parallel_residual", "norm_topk_prob")
    other = {k: not getattr(default, k) for k in switches if hasattr(default, k)}
    numbers = ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", "norm_epsilon")
    other |= {key: 0.125 for key in numbers if hasattr(default, key)}
    biases = ["use_bias", "enable_bias"]
    biases += ["attention_bias", "mlp_bias"] if architecture in WITH_BIASES else []
    other |= {key: not getattr(default, key) for key in biases if hasattr(default, key)}
    if architecture in (MISTRAL, MIXTRAL, PHI3, STARCODER2):
        other["sliding_window"] = 7
    if hasattr(default, "rope_parameters"):
        other["rope_parameters"] = {**default.rope_parameters, "rope_theta": 777.0}
    if architecture in (PHI3, NEOX):
        other["rope_parameters"]["partial_rotary_factor"] = 0.5
    theirs = small(architecture, **other)
    wanted, plain = meaning(architecture, theirs), meaning(architecture, default)
    same = {name for name in wanted if wanted[name] == plain[name]}
    model = model_config(file_of(architecture, theirs), "config.json")
    assert settings(model, wanted) == wanted
    assert not same & {"norm_epsilon", "kv_channels", "max_position_embeddings", "rotary_base"} - (
        {"norm_epsilon"} if architecture == OPT else set()
    )


@pytest.mark.parametrize("architecture", [QWEN2, QWEN3, QWEN3_MOE, SMOLLM3])
def test_windows_that_are_asked_for_without_a_size_are_the_classes(architecture):
    """And of the layers that the class has them of: all if it does not tell them apart."""
    said = {**SMALL, "num_hidden_layers": 30, "use_sliding_window": True}
    theirs = config_of(architecture, **said)
    model = model_config({**said, "architectures": [architecture]}, "config.json")
    window = theirs.sliding_window
    assert model.window_size == (None if window is None else f"{window - 1},0")
    if window is not None:
        assert window == 4096
        kinds = getattr(theirs, "layer_types", ["sliding_attention"] * 30)
        assert model.windowed_layers == [kind == "sliding_attention" for kind in kinds]
        assert sum(model.windowed_layers) == (30 if architecture == QWEN3_MOE else 2)


# What the class may compute and the table refuses, and what it takes beside the default.
REFUSED = {
    "hidden_act": ("gelu", [a for a in FAMILIES if a not in WITHOUT_GATE]),
    "activation_function": ("silu", [GPT2, OPT]),
    "scale_attn_weights": (False, [GPT2]),
    "scale_attn_by_inverse_layer_idx": (True, [GPT2]),
    "add_cross_attention": (True, [GPT2]),
    "attention_bias": (True, [QWEN3, QWEN3_MOE, OLMO2, OLMOE]),
    "clip_qkv": (8.0, [OLMOE]),
    "do_layer_norm_before": (False, [OPT]),
    "_remove_final_layer_norm": (True, [OPT]),
    "layer_norm_elementwise_affine": (False, [OPT]),
}
TAKEN = {
    "hidden_act": ("swish", REFUSED["hidden_act"][1]),
    "scale_attn_weights": (True, [GPT2]),
    "scale_attn_by_inverse_layer_idx": (False, [GPT2]),
    "add_cross_attention": (False, [GPT2]),
    "attention_bias": (False, [QWEN3, QWEN3_MOE, OLMO2, OLMOE]),
    "clip_qkv": (None, [OLMOE]),
    "do_layer_norm_before": (True, [OPT]),
    "_remove_final_layer_norm": (False, [OPT]),
    "layer_norm_elementwise_affine": (True, [OPT]),
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_the_layers_cannot_compute_is_refused(key):
    value, families = REFUSED[key]
    taken, _ = TAKEN.get(key, (None, []))
    for architecture in families:
        config = file_of(architecture, small(architecture))
        with pytest.raises(CheckpointError, match=f"{key}: found {value!r}, expected"):
            model_config({**config, key: value}, "config.json")
        if key in TAKEN:
            model_config({**config, key: taken}, "config.json")
    config = file_of(NEOX, small(NEOX))
    with pytest.raises(CheckpointError, match="attention_bias: found False, expected True"):
        model_config({**config, "attention_bias": False}, "config.json")


# What not every version of transformers has.
OF_VERSIONS = {
    "rope_theta", "rope_scaling", "partial_rotary_factor", "rotary_emb_base", "rotary_pct",
    "num_experts", "mlp_only_layers", "head_dim", "layer_types",
}  # fmt: skip
# No dropout, whatever the class's own is; of experts what the class has.
TRAINING = {
    GPT2: {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    OPT: {"attention_dropout": 0.0, "dropout": 0.0, "layerdrop": 0.0},
    NEOX: {"attention_dropout": 0.0, "hidden_dropout": 0.0},
    PHI3: {"attention_dropout": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    STARCODER2: {"attention_dropout": 0.0, "embedding_dropout": 0.0, "residual_dropout": 0.0},
    MIXTRAL: {"attention_dropout": 0.0, "output_router_logits": False, AUXILIARY: 0.001},
    QWEN3_MOE: {"attention_dropout": 0.0, "output_router_logits": False, AUXILIARY: 0.001},
    OLMOE: {"attention_dropout": 0.0, "output_router_logits": False, AUXILIARY: 0.01},
}
# Keys that another value than the one that is read would make another model.
FIXED = {
    OPT: {
        "do_layer_norm_before": True, "_remove_final_layer_norm": False,
        "layer_norm_elementwise_affine": True,
    },
    NEOX: {"attention_bias": True},
    OLMO2: {"attention_bias": False},
    QWEN3: {"attention_bias": False},
    QWEN3_MOE: {"attention_bias": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
    OLMOE: {"attention_bias": False, "clip_qkv": None},
}  # fmt: skip


@pytest.mark.parametrize("architecture", FAMILIES)
def test_what_is_written_is_what_the_class_has(architecture):
    theirs = small(architecture)
    model = model_config(file_of(architecture, theirs), "config.json")
    written: dict[str, Any] = {}
    for row in FAMILIES[architecture].config:
        written |= row.write(model)
    training = TRAINING.get(architecture, {"attention_dropout": 0.0})
    fixed = FIXED.get(architecture, {})
    assert {key: written[key] for key in {**training, **fixed}} == {**training, **fixed}
    own = theirs.to_dict()
    assert set(written) - set(own) <= OF_VERSIONS
    same = {key for key in written if own.get(key) is not None} - {*training, "hidden_act"}
    assert {key: written[key] for key in same} == {key: own[key] for key in same}
    # Those of training and of defaults alone are left out.
    left_out = {"scale_attn_weights", "scale_attn_by_inverse_layer_idx", "add_cross_attention"}
    assert not left_out & set(written)
    again = config_of(architecture, **written)
    assert meaning(architecture, again) == meaning(architecture, theirs)


@pytest.mark.parametrize("architecture", [LLAMA, GPT2, NEOX, MIXTRAL])
def test_what_is_written_for_every_family(architecture):
    model = model_config(file_of(architecture, small(architecture)), "config.json")
    model.init_method_std = 0.03
    written = huggingface_config(model, "bfloat16")
    assert written["use_cache"] is True and written["initializer_range"] == 0.03
    assert written["dtype"] == written["torch_dtype"] == "bfloat16"
    assert written["architectures"] == [architecture]
    assert written["model_type"] == FAMILIES[architecture].model_type


# In files every expert has tensors of its own; transformers stacks them when it loads them.
EXPERTS = {
    MIXTRAL: ("block_sparse_moe", ("w1", "w3"), "w2"),
    QWEN3_MOE: ("mlp", ("gate_proj", "up_proj"), "down_proj"),
    OLMOE: ("mlp", ("gate_proj", "up_proj"), "down_proj"),
}


def in_files(architecture: str, name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The tensors of a file that make one of the class's."""
    if architecture == NEOX and name == "lm_head.weight":
        return {"embed_out.weight": shape}
    if architecture not in WITH_EXPERTS or ".mlp." not in name:
        return {name: shape}
    block, gate_and_up, down = EXPERTS[architecture]
    name = name.replace(".mlp.", f".{block}.")
    if "experts" not in name:
        return {name: shape}
    fused = name.endswith("gate_up_proj")
    parts = gate_and_up if fused else (down,)
    folder = name.rpartition(".")[0]
    own = (shape[1] // len(parts), shape[2])
    return {f"{folder}.{n}.{part}.weight": own for n in range(shape[0]) for part in parts}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_tensors_have_the_names_and_shapes_of_the_class(architecture, tied):
    """Biases too, where a family may have them."""
    biases = {"attention_bias": True, "mlp_bias": True} if architecture in WITH_BIASES else {}
    theirs = small(architecture, tie_word_embeddings=tied, **biases)
    with torch.device("meta"):
        state = getattr(transformers, architecture)(theirs).state_dict()
    wanted: dict[str, tuple[int, ...]] = {}
    for name, value in state.items():
        if not (tied and name == "lm_head.weight"):
            wanted |= in_files(architecture, name, tuple(value.shape))
    model = model_config(file_of(architecture, theirs), "config.json")
    found = {}
    for rule in rules(model, architecture):
        found |= dict(zip(rule.parts, rule.part_shapes(), strict=True))
    assert found == wanted
