"""One Transformer layer by itself, as the trainer builds it: for measurements and tests."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.spec_utils import build_module

from megasparse.config import ResolvedConfig
from megasparse.megatron.model import spec_provider, transformer_config
from megasparse.megatron.spec import get_layer_spec


def build_layer(config: ResolvedConfig, device: torch.device) -> tuple[torch.nn.Module, Any]:
    """A module that names the layer `layers.0`, and the layer; weights are N(0, 0.02^2).

    Args:
        config: of the run; process groups must be up.
    """
    spec = get_layer_spec(spec_provider(config, device))
    layer = build_module(spec, config=transformer_config(config, device), layer_number=1)
    layer.to(device)
    generator = torch.Generator(device).manual_seed(config.train.seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=config.model.init_method_std, generator=generator)
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([layer])
    return model, layer


def rotary_frequencies(length: int, channels: int, device: torch.device) -> torch.Tensor:
    """Angles of rotary positions `(length, 1, 1, channels)`, base 10000."""
    rotary = RotaryEmbedding(
        kv_channels=channels, rotary_percent=1.0, use_cpu_initialization=device.type == "cpu"
    )
    return rotary(length).to(device)
