"""What ties the settings of a model together: refusals."""

from __future__ import annotations

from collections.abc import Iterator

from megasparse.config.resolved import ResolvedModel
from megasparse.config.schema.model import ModelConfig

ACTIVATIONS = ("swiglu", "geglu", "squared_relu", "relu", "exact_gelu")


def check_model(given: ModelConfig, model: ResolvedModel) -> Iterator[str]:
    """What is wrong with a model, one line each.

    Args:
        given: as loaded.
        model: with its defaults.
    """
    if given.kv_channels is None and model.hidden_size % model.num_attention_heads:
        yield (
            f"hidden_size {model.hidden_size} is not divisible by num_attention_heads "
            f"{model.num_attention_heads}; change one or set kv_channels"
        )
    activations = [name for name in ACTIVATIONS if getattr(model, name)]
    if len(activations) > 1:
        yield f"{' and '.join(activations)} are both set, expected one activation"
    yield from _check_attention(model)
    if given.group_query_attention and given.num_query_groups is None:
        yield "group_query_attention needs num_query_groups"
    if model.num_attention_heads % model.num_query_groups:
        yield (
            f"num_attention_heads {model.num_attention_heads} is not divisible by "
            f"num_query_groups {model.num_query_groups}"
        )
    if model.seq_length > model.max_position_embeddings:
        yield (
            f"seq_length {model.seq_length} is longer than max_position_embeddings "
            f"{model.max_position_embeddings}"
        )


def _check_attention(model: ResolvedModel) -> Iterator[str]:
    for name in ("windowed_layers", "layers_without_rope"):
        try:
            getattr(model, name)
        except ValueError as error:
            setting = {"windowed_layers": "window_attn_skip_freq"}.get(name, "no_rope_freq")
            yield f"{setting} {error}"
    if model.window_attn_skip_freq is not None and model.window_size is None:
        yield f"window_attn_skip_freq {model.window_attn_skip_freq} needs window_size"
    if model.no_rope_freq is not None and model.position_embedding_type != "rope":
        yield f"no_rope_freq {model.no_rope_freq} needs position_embedding_type rope"
    if model.qk_layernorm_scope == "all" and not model.qk_layernorm:
        yield "qk_layernorm_scope all needs qk_layernorm"
    if model.qk_layernorm_scope == "all" and model.normalization != "RMSNorm":
        yield f"qk_layernorm_scope all needs normalization RMSNorm, found {model.normalization}"
    if model.parallel_residual and model.norm_placement != "pre":
        yield f"parallel_residual needs norm_placement pre, found {model.norm_placement}"
    rotates = int(model.kv_channels * model.rotary_percent)
    if model.position_embedding_type == "rope" and (model.rotary_percent > 1.0 or rotates % 2):
        yield (
            f"rotary_percent {model.rotary_percent} of kv_channels {model.kv_channels}, expected "
            "an even number of channels that rotate"
        )
