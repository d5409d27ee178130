"""Architectures whose layers megatron-core 0.16 and this package do not build: what stands in the
way, by the key of `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SOFTCAP = "softmax attention here has no cap on its logits"
_SCALED = "Gemma multiplies embeddings by the square root of it, which no embedding here does"
_TWO_ROPES = "layers with a window have a rotary base of their own; megatron-core has one for all"
_SHARED = "its layers have a shared expert behind a gate, whose tensors are not read"

# Of each the keys, in the order in which they are looked for; the last is in every file.
_REASONS: dict[str, tuple[tuple[str, str], ...]] = {
    "GemmaForCausalLM": (("hidden_size", _SCALED),),
    "Gemma2ForCausalLM": (
        ("attn_logit_softcapping", _SOFTCAP),
        ("final_logit_softcapping", "the output layer here has no cap on its logits"),
        ("hidden_size", _SCALED),
    ),
    "Gemma3ForCausalLM": (
        ("rope_local_base_freq", _TWO_ROPES),
        ("rope_parameters", _TWO_ROPES),
        ("hidden_size", _SCALED),
    ),
    "Gemma3ForConditionalGeneration": (("vision_config", "there are no images here"),),
    "Qwen2MoeForCausalLM": (("shared_expert_intermediate_size", _SHARED),),
}


def what_stands_in_the_way(architecture: str, config: Mapping[str, Any]) -> str | None:
    """`KEY VALUE: reason` of a known architecture that cannot be built; None: it is not known.

    Args:
        config: of the `config.json`.
    """
    reasons = _REASONS.get(architecture)
    if reasons is None:
        return None
    key, reason = next((one for one in reasons if config.get(one[0]) is not None), reasons[-1])
    value = config.get(key)
    said = f"{key} {value!r}" if isinstance(value, (int, float)) else key
    return f"{said}: {reason}"
