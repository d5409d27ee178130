"""`config.json` of Hugging Face <-> `CompleteModel`, for LLaMA (2, 3) and GPT-2.

Whatever changes what the weights compute is either translated or refused; what concerns only
training (dropout, initialisation) keeps its default.
"""

from __future__ import annotations

from typing import Any

from megasparse.config import CompleteModel, ModelConfig, ResolvedModel, narrowed
from megasparse.errors import CheckpointError, ConfigError

LLAMA, GPT2 = "LlamaForCausalLM", "GPT2LMHeadModel"
SUPPORTED = (LLAMA, GPT2)
_MODEL_TYPES = {"llama": LLAMA, "gpt2": GPT2}
# Before the names of all tensors but the output layer's; older files of a base model lack it.
BASE_PREFIXES = {LLAMA: "model.", GPT2: "transformer."}

# megatron-core's rotary scaling has these built in; they are those of Llama 3.1 to 3.3.
_LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# Fields that say what function the weights compute. The rest (sequence length, dropout, initial
# weights, padding) may differ from run to run.
DEFINING = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups",
    "kv_channels", "position_embedding_type", "normalization", "norm_epsilon", "swiglu", "geglu",
    "squared_relu", "disable_bias_linear", "untie_embeddings_and_output_weights",
)  # fmt: skip
ROTARY = ("rotary_base", "rotary_percent", "use_rope_scaling", "rope_scaling_factor")
# Sequences to train on by default: contexts of 128k tokens are no sensible start.
_MAX_SEQ_LENGTH = 4096


def defining_fields(model: ResolvedModel) -> list[str]:
    """Names of the settings that say what function a model's weights compute."""
    if model.position_embedding_type == "rope":
        return [*DEFINING, *ROTARY]
    return [*DEFINING, "max_position_embeddings"]


def architecture_of(config: dict[str, Any], where: str) -> str:
    """The supported class that a `config.json` names.

    Raises:
        CheckpointError: another one.
    """
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 else None
    name = name or _MODEL_TYPES.get(str(config.get("model_type")))
    if name not in SUPPORTED:
        found = name or config.get("model_type")
        raise CheckpointError(
            f"{where}: unknown architecture {found!r}, expected {' or '.join(SUPPORTED)}"
        )
    return name


def model_config(config: dict[str, Any], where: str) -> CompleteModel:
    """The model that a `config.json` describes.

    Raises:
        CheckpointError: unknown architecture, a key is missing or of the wrong type, or the model
            has something that megasparse cannot compute.
    """
    reader = _Reader(config, where)
    if config.get("quantization_config"):
        raise CheckpointError(f"{where}: quantization_config: expected a model in full precision")
    build = _llama if architecture_of(config, where) == LLAMA else _gpt2
    model = narrowed(CompleteModel, build(reader), where)
    model.seq_length = min(model.max_position_embeddings, _MAX_SEQ_LENGTH)
    model.group_query_attention = model.num_query_groups != model.num_attention_heads
    return model


def huggingface_config(model: CompleteModel, dtype: str) -> dict[str, Any]:
    """The `config.json` of a model.

    Args:
        model: to be described.
        dtype: torch's name of the weights' type, e.g. "bfloat16".

    Raises:
        ConfigError: neither architecture computes this model; names the first difference.
    """
    rope = model.position_embedding_type == "rope"
    config = _llama_config(model) if rope else _gpt2_config(model)
    config.update(
        {
            "initializer_range": model.init_method_std,
            "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
            "vocab_size": model.vocab_size,
            "dtype": dtype,
            "torch_dtype": dtype,  # transformers before version 5
            "use_cache": True,
        }
    )
    return config


class _Reader:
    """Typed access to a `config.json`."""

    def __init__(self, config: dict[str, Any], where: str) -> None:
        self._config, self.where = config, where

    def get(self, name: str, kind: type, default: Any = None) -> Any:
        value = self._config.get(name)
        if value is None:
            value = default
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            found = "nothing" if value is None else repr(value)
            raise CheckpointError(f"{self.where}: {name}: found {found}, expected {kind.__name__}")
        return value

    def size(self, name: str, default: int | None = None) -> int:
        value = self.get(name, int, default)
        if value < 1:
            raise CheckpointError(f"{self.where}: {name}: found {value}, expected at least 1")
        return value

    def require(self, name: str, allowed: tuple[Any, ...], default: Any) -> None:
        """Refuse a model that computes something else."""
        value = self._config.get(name, default)
        if value not in allowed:
            expected = " or ".join(repr(one) for one in allowed)
            raise CheckpointError(f"{self.where}: {name}: found {value!r}, expected {expected}")


def _llama(config: _Reader) -> ModelConfig:
    config.require("hidden_act", ("silu", "swish"), "silu")
    heads, hidden = config.size("num_attention_heads"), config.size("hidden_size")
    bias = config.get("attention_bias", bool, False)
    config.require("mlp_bias", (bias,), False)
    positions = config.size("max_position_embeddings", 2048)
    base, factor = _rope(config, positions)
    return ModelConfig(
        num_layers=config.size("num_hidden_layers"),
        hidden_size=hidden,
        ffn_hidden_size=config.size("intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=config.size("num_key_value_heads", heads),
        kv_channels=config.size("head_dim", hidden // heads),
        max_position_embeddings=positions,
        position_embedding_type="rope",
        rotary_base=base,
        use_rope_scaling=factor is not None,
        rope_scaling_factor=factor or ModelConfig.rope_scaling_factor,
        normalization="RMSNorm",
        norm_epsilon=config.get("rms_norm_eps", float, 1e-6),
        swiglu=True,
        disable_bias_linear=not bias,
        untie_embeddings_and_output_weights=not config.get("tie_word_embeddings", bool, False),
        vocab_size=config.size("vocab_size"),
    )


def _rope(config: _Reader, positions: int) -> tuple[int, float | None]:
    """Base, and Llama 3's scaling factor or None; in version 5's form or the one before.

    Keys that are not there are what transformers takes for them, or missing there too.
    """
    new = config.get("rope_parameters", dict, {})
    old = config.get("rope_scaling", dict, {})
    scaling = _Reader({**old, **new}, f"{config.where}: rope")
    base = scaling.get("rope_theta", float, config.get("rope_theta", float, 10000.0))
    if base != int(base):
        raise CheckpointError(f"{config.where}: rope_theta: found {base}, expected a whole number")
    config.require("partial_rotary_factor", (1.0, None), None)
    scaling.require("partial_rotary_factor", (1.0, None), None)
    kind = new.get("rope_type", new.get("type", old.get("rope_type", old.get("type", "default"))))
    if kind == "default":
        return int(base), None
    scaling.require("rope_type", ("llama3",), kind)
    factor = scaling.get("factor", float)
    trained = config.get("original_max_position_embeddings", int, 0)
    trained = trained or scaling.get("original_max_position_embeddings", int, positions)
    found = {"original_max_position_embeddings": trained}
    found |= {name: scaling.get(name, float) for name in ("low_freq_factor", "high_freq_factor")}
    for name, value in _LLAMA3_ROPE.items():
        if found[name] != value:
            raise CheckpointError(
                f"{scaling.where}: {name}: found {found[name]!r}, expected {value!r}"
            )
    return int(base), factor


def _gpt2(config: _Reader) -> ModelConfig:
    config.require("activation_function", ("gelu_new", "gelu_pytorch_tanh"), "gelu_new")
    config.require("scale_attn_weights", (True,), True)
    config.require("scale_attn_by_inverse_layer_idx", (False,), False)
    config.require("add_cross_attention", (False,), False)
    hidden, heads = config.size("n_embd"), config.size("n_head")
    if hidden % heads:
        raise CheckpointError(f"{config.where}: n_embd {hidden} is not divisible by n_head {heads}")
    return ModelConfig(
        num_layers=config.size("n_layer"),
        hidden_size=hidden,
        ffn_hidden_size=config.size("n_inner", 4 * hidden),
        num_attention_heads=heads,
        num_query_groups=heads,
        kv_channels=hidden // heads,
        max_position_embeddings=config.size("n_positions", 1024),
        position_embedding_type="learned_absolute",
        normalization="LayerNorm",
        norm_epsilon=config.get("layer_norm_epsilon", float, 1e-5),
        swiglu=False,
        disable_bias_linear=False,
        untie_embeddings_and_output_weights=not config.get("tie_word_embeddings", bool, True),
        vocab_size=config.size("vocab_size"),
    )


def _require(model: CompleteModel, architecture: str, **expected: Any) -> None:
    for name, value in expected.items():
        if getattr(model, name) != value:
            raise ConfigError(
                f"no Hugging Face architecture computes this model: {name} is "
                f"{getattr(model, name)!r}, {architecture} has {value!r}"
            )


def _llama_config(model: CompleteModel) -> dict[str, Any]:
    _require(
        model,
        LLAMA,
        normalization="RMSNorm",
        geglu=False,
        squared_relu=False,
        swiglu=True,
        rotary_percent=1.0,
    )
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(model.rotary_base)}
    if model.use_rope_scaling:
        rope.update(rope_type="llama3", factor=model.rope_scaling_factor, **_LLAMA3_ROPE)
    bias = not model.disable_bias_linear
    return {
        "architectures": [LLAMA],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.kv_channels,
        "max_position_embeddings": model.max_position_embeddings,
        "rms_norm_eps": model.norm_epsilon,
        "rope_parameters": rope,
        # transformers before version 5
        "rope_theta": float(model.rotary_base),
        "rope_scaling": rope if model.use_rope_scaling else None,
        "attention_bias": bias,
        "mlp_bias": bias,
        "attention_dropout": 0.0,
    }


def _gpt2_config(model: CompleteModel) -> dict[str, Any]:
    _require(
        model,
        GPT2,
        normalization="LayerNorm",
        swiglu=False,
        geglu=False,
        squared_relu=False,
        disable_bias_linear=False,
        num_query_groups=model.num_attention_heads,
        kv_channels=model.hidden_size // model.num_attention_heads,
    )
    return {
        "architectures": [GPT2],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "n_embd": model.hidden_size,
        "n_inner": model.ffn_hidden_size,
        "n_layer": model.num_layers,
        "n_head": model.num_attention_heads,
        "n_positions": model.max_position_embeddings,
        "layer_norm_epsilon": model.norm_epsilon,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }
