"""Megatron-core's own Transformer Engine layers in our engine: the baseline of 2:4 layers."""

from __future__ import annotations

import dataclasses

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

from megasparse.config import ResolvedConfig
from megasparse.megatron.grid import Grid
from megasparse.megatron.model import finish_model, transformer_config
from megasparse.sparsity.controller import Clock, SparsityController
from megasparse.sparsity.recipe import make_recipe
from megasparse.train.engine.plain import PlainEngine


class BaselineEngine(PlainEngine):
    """Trains a model of Transformer Engine's layers.

    Megatron-core clears the layers' mark of a step's first micro-batch and leaves it to the loop to
    set it again; without it FP8 layers keep their first weights for ever.
    """

    def train_step(self, batches):  # type: ignore[no-untyped-def]
        self.model.set_is_first_microbatch()
        return super().train_step(batches)


def build_baseline(
    config: ResolvedConfig, grid: Grid, vocabulary: int, fp8: bool
) -> BaselineEngine:
    """The dense model of a configuration from megatron-core's Transformer Engine spec, on one GPU.

    Args:
        config: with the recipe "dense".
        vocabulary: padded.
        fp8: linears in FP8, delayed scaling, e4m3 and e5m2 ("hybrid").
    """
    model = config.model
    layers = dataclasses.replace(
        transformer_config(config, grid.device),
        use_te_activation_func=False,
        bias_activation_fusion=True,
        fp8="hybrid" if fp8 else None,
        fp8_recipe="delayed",
        fp8_amax_history_len=1024,
        fp8_amax_compute_algo="max",
    )
    gpt = GPTModel(
        config=layers,
        transformer_layer_spec=get_gpt_layer_with_transformer_engine_spec(),
        vocab_size=vocabulary,
        max_sequence_length=model.max_position_embeddings,
        parallel_output=True,
        share_embeddings_and_output_weights=not model.untie_embeddings_and_output_weights,
        position_embedding_type=model.position_embedding_type,
        rotary_percent=model.rotary_percent,
        rotary_base=model.rotary_base,
    )
    finish_model(gpt, config, grid)
    clock = Clock(config.train.seed, config.train.train_iters)
    controller = SparsityController(make_recipe("dense"), clock)
    torch.cuda.empty_cache()
    return BaselineEngine(config, grid, gpt, controller)
