"""Megatron's arguments, as its checkpoints hold them -> the model that they describe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megasparse.config import CompleteModel, ModelConfig, narrowed
from megasparse.config.layer_patterns import PATTERN_FORM, WINDOW_FORM, pattern_text, window_text
from megasparse.errors import CheckpointError, ConfigError


def complete_model(
    arguments: dict[str, Any], rows: int, vocab_size: int | None, where: str
) -> CompleteModel:
    """The model that Megatron's arguments describe.

    Args:
        rows: of the word embeddings, padding included.
        vocab_size: before padding; None: what the arguments say, else all rows.
        where: names the checkpoint in messages.

    Raises:
        CheckpointError: a size is missing. ConfigError: megasparse cannot compute it, or
            `vocab_size` is more than `rows`.
    """
    model = megatron_config(arguments, where)
    stated = arguments.get("vocab_size")
    known = stated if isinstance(stated, int) and 0 < stated <= rows else rows
    model.vocab_size = vocab_size or known
    complete = narrowed(CompleteModel, model, where)
    if complete.vocab_size > rows:
        raise ConfigError(f"vocab_size {vocab_size} is more than the {rows} rows of {where}")
    return complete


def megatron_config(arguments: dict[str, Any], where: str) -> ModelConfig:
    """The model that Megatron's arguments describe, but the vocabulary.

    Raises:
        CheckpointError: a size is missing. ConfigError: megasparse cannot compute it.
    """

    def size(*names: str) -> int:
        for name in names:
            value = arguments.get(name)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
        raise CheckpointError(f"{where}: args: found no {names[0]}")

    def flag(name: str, default: bool = False) -> bool:
        return bool(arguments.get(name, default))

    _refuse_what_is_missing(arguments, where)
    heads, hidden = size("num_attention_heads"), size("hidden_size")
    groups = arguments.get("num_key_value_heads") or heads
    if flag("group_query_attention"):
        groups = size("num_query_groups")
    positions = arguments.get("position_embedding_type", "learned_absolute")
    if flag("use_rotary_position_embeddings"):
        positions = "rope"
    normalization = str(arguments.get("normalization", "LayerNorm")).lower()
    bias = not flag("disable_bias_linear")
    return ModelConfig(
        num_layers=size("num_layers"),
        hidden_size=hidden,
        ffn_hidden_size=size("ffn_hidden_size"),
        num_attention_heads=heads,
        num_query_groups=groups,
        group_query_attention=groups != heads,
        kv_channels=arguments.get("kv_channels") or hidden // heads,
        seq_length=size("seq_length", "max_position_embeddings"),
        max_position_embeddings=size("max_position_embeddings"),
        position_embedding_type=str(positions),
        rotary_base=int(arguments.get("rotary_base") or arguments.get("rope_theta") or 10000),
        rotary_percent=float(arguments.get("rotary_percent", 1.0)),
        use_rope_scaling=flag("use_rope_scaling"),
        rope_scaling_factor=float(arguments.get("rope_scaling_factor", 8.0)),
        normalization="RMSNorm" if normalization == "rmsnorm" else "LayerNorm",
        norm_epsilon=float(
            arguments.get("norm_epsilon") or arguments.get("layernorm_epsilon") or 1e-5
        ),
        swiglu=flag("swiglu"),
        squared_relu=flag("squared_relu"),
        exact_gelu=_exact_gelu(arguments),
        add_qkv_bias=flag("add_qkv_bias"),
        qk_layernorm=flag("qk_layernorm"),
        window_size=_text(arguments, "window_size", window_text, WINDOW_FORM, where),
        window_attn_skip_freq=_text(
            arguments, "window_attn_skip_freq", pattern_text, PATTERN_FORM, where
        ),
        no_rope_freq=_text(arguments, "no_rope_freq", pattern_text, PATTERN_FORM, where),
        disable_bias_linear=not flag("add_bias_linear", bias),
        untie_embeddings_and_output_weights=flag("untie_embeddings_and_output_weights"),
    )


# Settings with the same name and meaning.
_SAME = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels",
    "num_query_groups", "group_query_attention", "seq_length", "max_position_embeddings",
    "position_embedding_type", "rotary_base", "rotary_percent", "use_rope_scaling",
    "rope_scaling_factor", "normalization", "norm_epsilon", "swiglu", "squared_relu",
    "add_qkv_bias", "qk_layernorm", "untie_embeddings_and_output_weights", "vocab_size",
)  # fmt: skip
# Settings that no layer of Megatron has.
_OURS = ("geglu", "relu", "parallel_residual", "num_experts")


def megatron_arguments(model: CompleteModel, padded_vocab_size: int) -> dict[str, Any]:
    """The arguments with which Megatron builds a model; `megatron_config` reads them.

    Raises:
        ConfigError: none do; names the setting.
    """
    wrong = [name for name in _OURS if getattr(model, name)]
    if model.norm_placement != "pre":
        wrong.append("norm_placement")
    if model.qk_layernorm_scope == "all":
        wrong.append("qk_layernorm_scope")
    if wrong:
        raise ConfigError(
            f"Megatron's layers do not compute this model: {wrong[0]} is "
            f"{getattr(model, wrong[0])!r}"
        )
    window = None if model.window is None else (model.window - 1, 0)
    return {
        **{name: getattr(model, name) for name in _SAME},
        "padded_vocab_size": padded_vocab_size,
        "add_bias_linear": not model.disable_bias_linear,
        "bias_gelu_fusion": not model.exact_gelu,
        "window_size": window,
        "window_attn_skip_freq": _number_or_list(model.window_attn_skip_freq),
        "no_rope_freq": _number_or_list(model.no_rope_freq),
    }


def _number_or_list(pattern: str | None) -> int | list[int] | None:
    """A pattern of layers as Megatron keeps it."""
    if pattern is None or pattern.isdecimal():
        return None if pattern is None else int(pattern)
    return [int(item) for item in pattern.strip("[]").split(",")]


def _refuse_what_is_missing(arguments: dict[str, Any], where: str) -> None:
    """Settings with another function than megasparse's layers, under which no tensor is missing."""
    positions = arguments.get("position_embedding_type", "learned_absolute")
    wrong = {
        "quick_geglu": bool(arguments.get("quick_geglu")),  # another GELU than --geglu's
        "apply_layernorm_1p": bool(arguments.get("apply_layernorm_1p")),
        "rotary_interleaved": bool(arguments.get("rotary_interleaved")),
        "rotary_seq_len_interpolation_factor": bool(
            arguments.get("rotary_seq_len_interpolation_factor")
        ),
        "position_embedding_type": positions not in ("learned_absolute", "rope"),
        "qk_l2_norm": bool(arguments.get("qk_l2_norm")),
        "num_experts": bool(arguments.get("num_experts")),  # Megatron's are not stacked
        "apply_residual_connection_post_layernorm": bool(
            arguments.get("apply_residual_connection_post_layernorm")
        ),
        "softmax_type": arguments.get("softmax_type", "vanilla") != "vanilla",
    }
    for name, is_wrong in wrong.items():
        if is_wrong:
            raise ConfigError(
                f"{where}: args: {name} {arguments.get(name)!r} is not what megasparse computes"
            )


def _exact_gelu(arguments: dict[str, Any]) -> bool:
    """Without its fusion Megatron's GELU is the exact one, with it the tanh form."""
    others = ("swiglu", "squared_relu", "openai_gelu")
    plain = not any(arguments.get(name) for name in others)
    return plain and arguments.get("bias_gelu_fusion") is False


def _text(
    arguments: dict[str, Any], name: str, canonical: Callable[[Any], str], form: str, where: str
) -> str | None:
    """A window or a pattern of layers, in our spelling."""
    value = arguments.get(name)
    if value is None:
        return None
    try:
        return canonical(value)
    except (ValueError, TypeError):
        raise ConfigError(f"{where}: args: {name}: found {value!r}, expected {form}") from None
