"""Whether a run's FP8 can be had on the device at hand, and what becomes of it if not."""

from __future__ import annotations

import dataclasses

import torch

from megasparse.config import ResolvedConfig
from megasparse.config.shapes import layer_parameters
from megasparse.errors import ConfigError
from megasparse.fp8 import shapes, transformer_engine
from megasparse.log import warn_once
from megasparse.sparsity.run_recipe import recipe_of


def settle_fp8(config: ResolvedConfig, device: torch.device | None) -> ResolvedConfig:
    """The configuration with the FP8 that the device has: as given, or with `fp8_fallback` none.

    On a CPU FP8 is computed by its definition, unless the run may fall back.

    Args:
        device: of the run; None: some GPU that has FP8.

    Raises:
        ConfigError: the run wants FP8, it cannot be had, and the run may not fall back.
    """
    wanted = config.fp8.fp8_format
    if wanted is None:
        return config
    reason = _refusal(config, device)
    if reason is None:
        return config
    if config.fp8.fp8_fallback:
        own = "bfloat16" if config.train.bf16 else "float32"
        warn_once("FP8 is not used (fp8_fallback), the linears stay in %s: %s", own, reason)
        return dataclasses.replace(config, fp8=dataclasses.replace(config.fp8, fp8_format=None))
    if device is None or device.type != "cpu":
        raise ConfigError(f"fp8_format {wanted}: {reason}")
    warn_once(
        "FP8 is computed by its definition on a CPU: operands are rounded as on a GPU, and "
        "multiplied in float32, without speed"
    )
    return config


def _refusal(config: ResolvedConfig, device: torch.device | None) -> str | None:
    if not config.train.bf16:
        return "the run is in float32, expected --bf16"
    missing = None if device is None else transformer_engine.refusal(device)
    return missing or _shape_refusal(config)


def _shape_refusal(config: ResolvedConfig) -> str | None:
    """Of the first linear that FP8 GEMMs do not take."""
    model, recipe = config.model, recipe_of(config)
    tp = config.parallel.tensor_model_parallel_size
    for kind in dict.fromkeys(model.expert_layers):  # with experts, or without
        numbers = [n for n, experts in enumerate(model.expert_layers) if experts == kind]
        for one in layer_parameters(model, numbers[0]):
            if not one.is_linear:
                continue
            rows, columns = one.local_shape(tp)
            shape, parts = (rows // one.experts, columns), max(one.parts // one.experts, 1)
            names = [f"{model.block}.layers.{n}.{one.module}" for n in numbers]
            for sparse in {recipe.matches(name) for name in names}:
                if reason := shapes.refusal(one.module, shape, tp, parts, sparse):
                    return reason
    return None
