"""`config.json` of Hugging Face <-> `CompleteModel`, by the table of families (`families.py`).

Whatever changes what the weights compute is either translated or refused; what concerns only
training (dropout, initialisation) keeps its default.
"""

from __future__ import annotations

from typing import Any

from megasparse.config import CompleteModel, ModelConfig, ResolvedModel, narrowed
from megasparse.convert.huggingface.config_keys import Found, Reader, default_of
from megasparse.convert.huggingface.families import FAMILIES
from megasparse.convert.huggingface.family import Family
from megasparse.convert.huggingface.unbuilt import what_stands_in_the_way
from megasparse.errors import CheckpointError, ConfigError

_MODEL_TYPES = {family.model_type: name for name, family in FAMILIES.items()}

# Fields that say what function the weights compute. The rest (sequence length, dropout, initial
# weights, padding) may differ from run to run.
DEFINING = (
    "model_type", "bert_binary_head",
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups",
    "kv_channels", "position_embedding_type", "normalization", "norm_epsilon", "swiglu", "geglu",
    "squared_relu", "relu", "exact_gelu", "disable_bias_linear", "add_qkv_bias", "norm_placement",
    "parallel_residual", "qk_layernorm", "qk_layernorm_scope", "window_size",
    "window_attn_skip_freq", "no_rope_freq", "untie_embeddings_and_output_weights", "num_experts",
    "expert_layers", "moe_ffn_hidden_size", "moe_router_topk", "moe_router_pre_softmax",
    "moe_shared_expert_intermediate_size", "moe_shared_expert_gate",
)  # fmt: skip
ROTARY = ("rotary_base", "rotary_percent", "use_rope_scaling", "rope_scaling_factor")
# Sequences to train on by default: contexts of 128k tokens are no sensible start.
_MAX_SEQ_LENGTH = 4096


def defining_fields(model: ResolvedModel) -> list[str]:
    """Names of the settings that say what function a model's weights compute."""
    if model.position_embedding_type == "rope":
        return [*DEFINING, *(ROTARY if model.use_rope_scaling else ROTARY[:3])]
    return [*DEFINING, "max_position_embeddings"]


def differences(found: ResolvedModel, model: ResolvedModel) -> list[str]:
    """Names of the settings by which two models compute different functions."""
    names = dict.fromkeys([*defining_fields(found), *defining_fields(model)])
    return [name for name in names if getattr(found, name) != getattr(model, name)]


def architecture_of(config: dict[str, Any], where: str) -> str:
    """The supported class that a `config.json` names.

    Raises:
        CheckpointError: another one.
    """
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 else None
    name = name or _MODEL_TYPES.get(str(config.get("model_type")))
    if name not in FAMILIES:
        found = name or config.get("model_type")
        if (reason := what_stands_in_the_way(str(found), config)) is not None:
            raise CheckpointError(f"{where}: {found} cannot be built: {reason}")
        raise CheckpointError(
            f"{where}: unknown architecture {found!r}, expected one of {', '.join(FAMILIES)}"
        )
    return str(name)


def model_config(config: dict[str, Any], where: str) -> CompleteModel:
    """The model that a `config.json` describes.

    Raises:
        CheckpointError: unknown architecture, a key is missing or of the wrong type, or the model
            has something that megasparse cannot compute.
    """
    if config.get("quantization_config"):
        raise CheckpointError(f"{where}: quantization_config: expected a model in full precision")
    return _read(FAMILIES[architecture_of(config, where)], config, where)


def huggingface_config(model: CompleteModel, dtype: str) -> dict[str, Any]:
    """The `config.json` of a model.

    Args:
        model: to be described.
        dtype: torch's name of the weights' type, e.g. "bfloat16".

    Raises:
        ConfigError: no architecture computes this model; names a difference to the one that is
            most like it.
    """
    # What is written is read again: a family computes the model if it is the same one then.
    nearest: list[str] | None = None
    for name, family in FAMILIES.items():
        config = _write(family, model)
        back = _read(family, config, name)
        found = sorted(differences(back, model), key=lambda field: _is_default(model, field))
        if not found:
            return config | _of_any_family(model, dtype)
        if nearest is None or len(found) < len(nearest):
            nearest = [
                f"{field} is {getattr(model, field)!r}, {name} has {getattr(back, field)!r}"
                for field in found
            ]
    assert nearest is not None
    raise ConfigError(f"no Hugging Face architecture computes this model: {nearest[0]}")


def _is_default(model: ResolvedModel, field: str) -> bool:
    return bool(getattr(model, field) == default_of(field))


def _read(family: Family, config: dict[str, Any], where: str) -> CompleteModel:
    reader, found = Reader(config, where), Found()
    for row in family.config:
        row.read(reader, found)
    model = narrowed(CompleteModel, ModelConfig(**found), where)
    model.seq_length = min(model.max_position_embeddings, _MAX_SEQ_LENGTH)
    model.group_query_attention = model.num_query_groups != model.num_attention_heads
    return model


def _write(family: Family, model: CompleteModel) -> dict[str, Any]:
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
    }
    for row in family.config:
        config |= row.write(model)
    return config


def _of_any_family(model: CompleteModel, dtype: str) -> dict[str, Any]:
    return {
        "initializer_range": model.init_method_std,
        "dtype": dtype,
        "torch_dtype": dtype,  # transformers before version 5
        "use_cache": True,
    }
