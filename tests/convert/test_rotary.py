"""A rotary block is taken as transformers takes it, whatever its keys, or refused by name."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
import transformers

from megasparse.convert.huggingface.architecture import model_config
from megasparse.errors import CheckpointError

KEYS = {
    "rope_theta": (10000.0, 500000.0),
    "factor": (8.0, 32.0),
    "low_freq_factor": (1.0, 2.0),
    "high_freq_factor": (4.0,),
    "original_max_position_embeddings": (8192, 4096),
    "partial_rotary_factor": (1.0, 0.5),
}
BASE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64,
    "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32,
}  # fmt: skip


def angles_of(config: dict) -> torch.Tensor | None:
    """Of transformers; None where it refuses the configuration."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    try:
        made = transformers.LlamaConfig.from_dict(config)
        return LlamaRotaryEmbedding(made).inv_freq
    except (KeyError, ValueError, TypeError, ZeroDivisionError):
        return None


def angles_here(config: dict) -> torch.Tensor:
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    model = model_config(config, "config.json")
    return RotaryEmbedding(
        kv_channels=model.kv_channels,
        rotary_percent=model.rotary_percent,
        rotary_base=model.rotary_base,
        rope_scaling=model.use_rope_scaling,
        rope_scaling_factor=model.rope_scaling_factor,
        use_cpu_initialization=True,
    ).inv_freq


def configs() -> list[dict]:
    draws = random.Random(0)
    made = []
    for block, name, kind in itertools.product(
        ("rope_parameters", "rope_scaling"), ("rope_type", "type"), ("llama3", "default")
    ):
        for _ in range(30):
            rope = {name: kind}
            for key, values in KEYS.items():
                # Mostly there and usual, so that every key is missed and changed alone too.
                if draws.random() < 0.85:
                    rope[key] = values[0] if draws.random() < 0.85 else draws.choice(values)
            config = {**BASE, block: rope}
            if draws.random() < 0.7:
                config["max_position_embeddings"] = draws.choice((8192, 131072))
            if draws.random() < 0.3:
                config["rope_theta"] = 250000.0
            made.append(config)
    return made


def test_every_block_gives_the_angles_of_transformers_or_is_refused():
    taken = refused = 0
    for config in configs():
        try:
            ours = angles_here(config)
        except CheckpointError:
            refused += 1
            continue
        theirs = angles_of(config)
        assert theirs is not None, config
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0.0, msg=str(config))
        taken += 1
    assert taken > 50 and refused > 50


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"low_freq_factor": None}, "low_freq_factor: found nothing"),
        ({"factor": None}, "factor: found nothing"),
        ({"original_max_position_embeddings": None}, "found 131072, expected 8192"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: found 0.5"),
    ],
)
def test_a_key_that_is_not_there_is_not_guessed(change, words):
    rope = {"rope_type": "llama3", **{key: values[0] for key, values in KEYS.items()}, **change}
    rope = {key: value for key, value in rope.items() if value is not None}
    config = {**BASE, "max_position_embeddings": 131072, "rope_parameters": rope}
    with pytest.raises(CheckpointError, match=words):
        model_config(config, "config.json")
