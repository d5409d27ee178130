"""Where the scales of a linear's inputs go: into the operation before it, so that none is left.

| linear     | before it                          | what is divided by s                         |
|------------|------------------------------------|----------------------------------------------|
| linear_qkv | input_layernorm, if there is one   | its weight and bias                          |
| linear_fc1 | pre_mlp_layernorm, if there is one | its weight and bias                          |
| linear_fc2 | gated FFN: `act(gate) * up`        | rows of `up` in linear_fc1, and their biases |
| linear_proj| attention, a K/V head a query head | rows of V in linear_qkv, and their biases    |

A GELU without a gate, and V heads that several query heads share, let no scale through.
"""

from __future__ import annotations

import torch

from megasparse.config import ResolvedModel

QKV, PROJ = "self_attention.linear_qkv", "self_attention.linear_proj"
FC1, FC2 = "mlp.linear_fc1", "mlp.linear_fc2"
# Linears after the ones whose rows they fold into come first.
ORDER = (FC2, PROJ, FC1, QKV)
_NORMS = {QKV: "input_layernorm", FC1: "pre_mlp_layernorm"}


def rows_before(name: str, model: ResolvedModel) -> tuple[str, torch.Tensor] | None:
    """The linear whose output rows are this one's inputs, and which rows; None if there is none.

    Args:
        name: within its layer.
    """
    if name == FC2 and model.gated:
        return FC1, torch.arange(model.ffn_hidden_size) + model.ffn_hidden_size
    if name == PROJ and model.num_query_groups == model.num_attention_heads:
        # Rows of the fused matrix: of every head q, then k, then v.
        heads = torch.arange(model.num_attention_heads)[:, None] * 3 + 2
        return QKV, (heads * model.kv_channels + torch.arange(model.kv_channels)).flatten()
    return None


def norm_before(name: str, model: ResolvedModel) -> str | None:
    """The norm whose output is this linear's input, within its layer; None if there is none."""
    return None if model.norm_placement == "post" else _NORMS.get(name)
