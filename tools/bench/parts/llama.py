"""Llamas of transformers for benchmarks: random weights, the sizes of published ones."""

from __future__ import annotations

from typing import Any

import torch

from megasparse.errors import ConfigError

# Of Llama 3.2 1B, Llama 3 8B (its layers alone: 8 of 32), and one that a CPU runs.
SIZES: dict[str, dict[str, int]] = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
           "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
    "8b-layers": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 8,
                  "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000},
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128},
}  # fmt: skip


def make(size: str, device: torch.device, positions: int, seed: int = 0) -> Any:
    """A `LlamaForCausalLM` in bfloat16 with untied embeddings.

    Args:
        positions: the longest sequence.

    Raises:
        ConfigError: transformers is not installed.
    """
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise ConfigError(
            f"transformers cannot be imported ({error}): pip install transformers"
        ) from None
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        **SIZES[size],
        "max_position_embeddings": positions,
        "tie_word_embeddings": False,
        "attn_implementation": "sdpa",
    }
    config = LlamaConfig(**settings)
    with torch.device(device):
        model: Any = LlamaForCausalLM(config)
    return model.to(torch.bfloat16)
