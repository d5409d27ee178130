"""Dense layers of Transformer Engine: one by itself, and a model of them in our engine.

The baselines that 2:4 layers are measured against. They are the other libraries' own, so this file
imports both past the package's doors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from megatron.core.fp8_utils import get_fp8_recipe
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

from megasparse.config import ResolvedConfig
from megasparse.megatron.graphs.layer_graphs import LayerGraphs
from megasparse.megatron.grid import Grid
from megasparse.megatron.model import finish_model, transformer_config
from megasparse.sparsity.clock import Clock
from megasparse.sparsity.controller import SparsityController
from megasparse.sparsity.recipe import make_recipe
from megasparse.train.engine.base import Engine
from megasparse.train.engine.plain import PlainLayout
from megasparse.train.engine.step_guard import Batch


def te_module(
    part: str, fp8: bool, sizes: tuple[int, int, int, int], device: torch.device
) -> tuple[torch.nn.Module, Callable[[], AbstractContextManager[Any]]]:
    """One layer in BF16 weights, and the context that its forward pass runs in.

    Args:
        part: "layer", or "ffn" for its norm and MLP.
        fp8: GEMMs in FP8, delayed scaling.
        sizes: hidden, FFN, heads, query groups.
    """
    import transformer_engine.pytorch as te  # not on CPUs
    from transformer_engine.common.recipe import DelayedScaling

    hidden, ffn, heads, groups = sizes
    common: dict[str, Any] = {
        "normalization": "RMSNorm",
        "activation": "swiglu",
        "bias": False,
        "params_dtype": torch.bfloat16,
        "device": device,
    }
    module: torch.nn.Module
    if part == "ffn":
        module = te.LayerNormMLP(hidden, ffn, **common)
    else:
        module = te.TransformerLayer(
            hidden,
            ffn,
            heads,
            num_gqa_groups=groups,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            self_attn_mask_type="causal",
            attn_input_format="sbhd",
            fuse_qkv_params=True,
            **common,
        )
    if not fp8:
        return module, nullcontext
    recipe = DelayedScaling()
    return module, lambda: te.autocast(enabled=True, recipe=recipe)


class BaselineLayout(PlainLayout):
    """Trains a model of Transformer Engine's layers.

    Megatron-core clears the layers' mark of a step's first micro-batch and leaves it to the loop to
    set it again; without it FP8 layers keep their first weights for ever.
    """

    adds_in_gemms = False  # weight gradients are added up by the GEMMs that compute them

    def _make_gradients(self) -> None:
        super()._make_gradients()
        if not self.adds_in_gemms:
            return
        assert self.gradients is not None
        for module in self.model.modules():
            if hasattr(module, "fuse_wgrad_accumulation"):
                module.fuse_wgrad_accumulation = True  # type: ignore[assignment]
                for parameter in module.parameters(recurse=False):
                    parameter.main_grad = self.gradients.views[parameter]  # type: ignore[attr-defined]

    def compute_and_update(self, batches: Iterator[Batch]) -> float:
        assert isinstance(self.model, GPTModel)
        self.model.set_is_first_microbatch()
        loss = super().compute_and_update(batches)
        if self.model.config.fp8 and self.graphs is not None:
            from transformer_engine.pytorch.quantization import FP8GlobalStateManager

            # Scales of gradients are updated by the first layer's backward pass, unless captured.
            FP8GlobalStateManager.reduce_and_update_fp8_tensors(forward=False)
        return loss

    def _graphs(self, layers: Sequence[tuple[torch.nn.Module, bool]], slots: int) -> LayerGraphs:
        assert isinstance(self.model, GPTModel)
        return BaselineGraphs(self.model, layers, self.controller, self.grid, self._places())


class BaselineGraphs(LayerGraphs):
    """Transformer Engine's layers captured by the same wrapper as ours.

    In FP8 a step's first micro-batch quantizes the weights and the others find them, so that it has
    graphs of its own: two slots.
    """

    def __init__(self, model: GPTModel, layers: Any, controller: Any, grid: Grid, places: Any):
        super().__init__(layers, controller, grid, places, slots=2 if model.config.fp8 else 1)
        self._model = model

    def slot_of(self, number: int) -> int:
        return min(number, self._slots - 1)

    def _capture(self, kind: bool) -> None:
        if not self._model.config.fp8:
            super()._capture(kind)
            return
        from transformer_engine.pytorch.graph import set_capture_end, set_capture_start

        self._model.set_is_first_microbatch()
        set_capture_start()
        try:
            super()._capture(kind)
        finally:
            set_capture_end()
        self._model.set_is_first_microbatch()

    @contextmanager
    def around(self) -> Iterator[None]:
        if not self._model.config.fp8:
            yield
            return
        import transformer_engine.pytorch as te
        from transformer_engine.pytorch.graph import set_capture_end, set_capture_start

        recipe = get_fp8_recipe(self._model.config)
        group = self._grid.tp_group if self._grid.tp_size > 1 else None
        set_capture_end()  # attention refuses Megatron's random states with it
        try:
            with te.autocast(enabled=True, recipe=recipe, amax_reduction_group=group, _graph=True):
                yield
        finally:
            set_capture_start()


def build_baseline(
    config: ResolvedConfig, grid: Grid, vocabulary: int, fp8: bool, fused: bool = False
) -> Engine:
    """The dense model of a configuration from megatron-core's Transformer Engine spec, on one GPU.

    Args:
        config: with the recipe "dense".
        vocabulary: padded.
        fp8: linears in FP8, delayed scaling, e4m3 and e5m2 ("hybrid").
        fused: weight gradients are added up by the GEMMs that compute them.
    """
    model = config.model
    layers = dataclasses.replace(
        transformer_config(config, grid.device),
        use_te_activation_func=False,
        bias_activation_fusion=model.swiglu,
        fp8="hybrid" if fp8 else None,
        fp8_recipe="delayed",
        fp8_amax_history_len=1024,
        fp8_amax_compute_algo="max",
    )
    gpt = GPTModel(
        config=layers,
        transformer_layer_spec=get_gpt_layer_with_transformer_engine_spec(
            num_experts=model.num_experts,
            moe_grouped_gemm=layers.moe_grouped_gemm,
            qk_layernorm=model.qk_layernorm,
        ),
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
    layout = BaselineLayout(config, grid, gpt, controller)
    layout.adds_in_gemms = fused
    return Engine(config, grid, layout, controller)
