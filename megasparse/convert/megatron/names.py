"""Names of parameters in Megatron's checkpoints, old and new."""

from __future__ import annotations

import re

# Longest first; from Megatron's names, old and new, to megatron-core's with separate norms.
_RENAMED = (
    (r"^module\.", ""),
    (r"^language_model\.", ""),
    (r"^(encoder|transformer)\.", "decoder."),
    (r"\.linear_qkv\.layer_norm_", ".@input_layernorm."),
    (r"\.linear_fc1\.layer_norm_", ".@pre_mlp_layernorm."),
    (r"\.(self_attention|mlp)\.@", "."),
    (r"\.attention\.", ".self_attention."),
    (r"\.query_key_value\.", ".linear_qkv."),
    (r"\.self_attention\.dense\.", ".self_attention.linear_proj."),
    (r"\.post_attention_layernorm\.", ".pre_mlp_layernorm."),
    (r"\.dense_h_to_4h\.", ".linear_fc1."),
    (r"\.dense_4h_to_h\.", ".linear_fc2."),
    (r"^decoder\.final_norm\.", "decoder.final_layernorm."),
    (r"^lm_head\.", "output_layer."),
)


def renamed(name: str) -> str:
    """A parameter's name here."""
    for pattern, new in _RENAMED:
        name = re.sub(pattern, new, name)
    return name
