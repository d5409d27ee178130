"""Build a GPT or a BERT from a ResolvedConfig: megatron-core's models with our spec provider."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from megasparse.config import ResolvedConfig, ResolvedModel
from megasparse.errors import ConfigError
from megasparse.megatron import loss
from megasparse.megatron.bert import Bert, BertClassifier
from megasparse.megatron.blocks.experts import finish_expert_layers
from megasparse.megatron.blocks.torch_modules import gelu_tanh, squared_relu
from megasparse.megatron.grid import Grid
from megasparse.megatron.init import initialize_weights
from megasparse.megatron.spec import (
    LayerStyle,
    SparseSpecProvider,
    get_block_spec,
    transformer_engine_is_there,
)


def transformer_config(config: ResolvedConfig, device: torch.device) -> TransformerConfig:
    """megatron-core's configuration of the layers."""
    model, parallel = config.model, config.parallel
    dtype = torch.bfloat16 if config.train.bf16 else torch.float32
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        normalization=model.normalization,
        layernorm_epsilon=model.norm_epsilon,
        gated_linear_unit=model.gated,
        activation_func=_activation(model),
        add_bias_linear=not model.disable_bias_linear,
        add_qkv_bias=model.add_qkv_bias,
        qk_layernorm=model.qk_layernorm,
        window_size=None if model.window is None else (model.window - 1, 0),
        window_attn_skip_freq=[int(layer) for layer in model.windowed_layers],
        no_rope_freq=[int(layer) for layer in model.layers_without_rope] or None,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        cp_comm_type=parallel.cp_comm_type,
        sequence_parallel=parallel.sequence_parallel,
        recompute_granularity=parallel.recompute_granularity,
        recompute_method=parallel.recompute_method,
        recompute_num_layers=parallel.recompute_num_layers,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=config.train.bf16,
        deterministic_mode=torch.are_deterministic_algorithms_enabled(),
        use_cpu_initialization=device.type == "cpu",
        perform_initialization=False,  # `initialize_weights` does it, whatever the layout
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        use_te_activation_func=model.gated,  # that is, the provider's
        apply_rope_fusion=spec_provider(config, device).transformer_engine,
        gradient_accumulation_fusion=False,
        cross_entropy_loss_fusion=loss.fused(device, dtype),
        cross_entropy_fusion_impl="te",
        persist_layer_norm=False,
        **_experts(config),
    )


def _experts(config: ResolvedConfig) -> dict[str, Any]:
    """megatron-core's settings of experts; none of a model without them."""
    model, parallel = config.model, config.parallel
    if model.num_experts is None:
        return {}
    balance = model.moe_router_load_balancing_type
    return {
        "num_moe_experts": model.num_experts,
        "moe_ffn_hidden_size": model.expert_width,
        "moe_layer_freq": [int(layer) for layer in model.expert_layers],
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": parallel.tensor_model_parallel_size,
        "moe_router_topk": model.moe_router_topk,
        "moe_router_pre_softmax": model.moe_router_pre_softmax,
        "moe_router_dtype": model.moe_router_dtype,
        "moe_router_load_balancing_type": balance,
        "moe_aux_loss_coeff": 0.0 if balance == "none" else model.moe_aux_loss_coeff,
        "moe_z_loss_coeff": model.moe_z_loss_coeff,
        "moe_shared_expert_intermediate_size": model.moe_shared_expert_intermediate_size,
        "moe_shared_expert_gate": model.moe_shared_expert_gate,
        "moe_token_dispatcher_type": parallel.moe_token_dispatcher_type,
        "moe_grouped_gemm": parallel.moe_grouped_gemm,
    }


def layer_style(model: ResolvedModel) -> LayerStyle:
    """Where the layers' norms are."""
    return LayerStyle(
        model.norm_placement,
        model.parallel_residual,
        model.qk_layernorm_scope if model.qk_layernorm else None,
        model.num_attention_heads,
        model.num_query_groups,
        causal=not model.is_bert,
    )


def spec_provider(config: ResolvedConfig, device: torch.device) -> SparseSpecProvider:
    """The provider of the layers' classes.

    Raises:
        ConfigError: Transformer Engine is asked for where it cannot be used.
    """
    asked = config.train.transformer_impl
    refusal = _transformer_engine_refusal(config, device)
    if asked == "transformer_engine" and refusal is not None:
        raise ConfigError(f"transformer_impl transformer_engine: {refusal}")
    return SparseSpecProvider(asked != "local" and refusal is None)


def _transformer_engine_refusal(config: ResolvedConfig, device: torch.device) -> str | None:
    """Why Transformer Engine cannot compute attention and norms, or None when it can."""
    if device.type != "cuda":
        return f"the run is on {device.type}, expected a GPU"
    if not transformer_engine_is_there():
        return "Transformer Engine is not installed"
    if not config.train.bf16:
        return "the run is in float32, expected bf16"
    if config.data.reset_attention_mask:
        if config.parallel.context_parallel_size > 1:
            return (
                "reset_attention_mask with context parallelism, for which packed documents would "
                "have to be multiples of 2 x context_parallel_size tokens"
            )
        if config.parallel.pipeline_model_parallel_size > 1:
            return "reset_attention_mask with a pipeline, whose stages pass masks on"
        if config.distillation.kd_loss_weight:
            return "reset_attention_mask with a teacher, which takes masks"
        if config.train.deterministic_mode:
            return "reset_attention_mask in deterministic_mode, which packed attention may not keep"
    return None


def packs_documents(config: ResolvedConfig, device: torch.device) -> bool:
    """Whether documents are kept apart by packed sequences instead of masks (`packing.py`)."""
    return config.data.reset_attention_mask and spec_provider(config, device).transformer_engine


def _activation(model: ResolvedModel) -> Callable[[torch.Tensor], torch.Tensor]:
    """Of the FFN. A gated one is the provider's `GatedActivation`, told by torch's function."""
    if model.swiglu:
        return torch.nn.functional.silu
    if model.geglu:
        return torch.nn.functional.gelu
    if model.relu:
        return torch.nn.functional.relu
    if model.exact_gelu:
        return torch.nn.functional.gelu
    return squared_relu if model.squared_relu else gelu_tanh


def build_model(config: ResolvedConfig, grid: Grid, padded_vocab_size: int) -> GPTModel | Bert:
    """This rank's part of the model, initialised.

    Args:
        config: of the run.
        grid: process groups must be up.
        padded_vocab_size: a multiple of the tensor-parallel size.
    """
    model = config.model
    layers = transformer_config(config, grid.device)
    provider = spec_provider(config, grid.device)
    block = get_block_spec(provider, model.num_layers, layer_style(model), model.expert_layers)
    if model.is_bert:
        kind = Bert if model.num_classes is None else BertClassifier
        bert = kind(layers, block, provider.layer_norm(), model, padded_vocab_size)
        finish_model(bert, config, grid)
        return bert
    gpt = GPTModel(
        config=layers,
        transformer_layer_spec=block,
        vocab_size=padded_vocab_size,
        max_sequence_length=model.max_position_embeddings,
        parallel_output=True,
        share_embeddings_and_output_weights=not model.untie_embeddings_and_output_weights,
        position_embedding_type=model.position_embedding_type,
        rotary_percent=model.rotary_percent,
        rotary_base=model.rotary_base,
        rope_scaling=model.use_rope_scaling,
        rope_scaling_factor=model.rope_scaling_factor,
    )
    finish_model(gpt, config, grid)
    return gpt


def finish_model(model: torch.nn.Module, config: ResolvedConfig, grid: Grid) -> None:
    """Place, cast, mark and initialise a model, or a part of one with the whole's names."""
    model.to(grid.device)
    finish_expert_layers(model)
    dtype = torch.bfloat16 if config.train.bf16 else torch.float32
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    _mark_vocabulary_shards(model)
    _mark_partial_gradients(model, grid)
    initialize_weights(
        model,
        config.train.seed,
        config.model.init_method_std,
        config.model.num_layers,
        grid.tp_rank,
        grid.tp_size,
    )


def hide_padding(model: torch.nn.Module, grid: Grid, vocab_size: int | None) -> None:
    """Keep tokens that only pad the vocabulary out of the softmax.

    Their logits become the smallest number of their type: probability and gradient 0. So the
    padding is no part of the model, and a loss is that of the model without it.

    Args:
        model: with the output layer, or a part without it.
        vocab_size: before padding; None: nothing is padding.
    """
    if vocab_size is None:
        return

    def hide(layer: torch.nn.Module, _: object, output: tuple[torch.Tensor, object]) -> None:
        logits = output[0]
        width = logits.shape[-1]
        gathered = width == layer.output_size
        first = vocab_size - (0 if gathered else grid.tp_rank * width)
        with torch.no_grad():  # no gradient comes back to them: the softmax is 0 there
            logits[..., max(first, 0) :] = torch.finfo(logits.dtype).min

    for module in model.modules():
        if isinstance(module, ColumnParallelLinear) and int(module.output_size) > vocab_size:
            module.register_forward_hook(hide)


def _mark_partial_gradients(model: torch.nn.Module, grid: Grid) -> None:
    """Mark weights that the heads share: every rank has the gradient of its heads alone.

    Megatron's mark of sequence parallelism is what `sum_replicated` goes by.
    """
    for module in model.modules():
        for name in ("q_layernorm", "k_layernorm"):
            norm = getattr(module, name, None)
            for parameter in norm.parameters() if isinstance(norm, torch.nn.Module) else ():
                if not getattr(parameter, "tensor_model_parallel", False):
                    parameter.sequence_parallel = grid.tp_size > 1  # type: ignore[attr-defined]


def _mark_vocabulary_shards(model: torch.nn.Module) -> None:
    """Mark Megatron's own sharded weights.

    megatron-core 0.16 does so only while it initialises them itself.
    """
    for module in model.modules():
        sharded = isinstance(module, (VocabParallelEmbedding, ColumnParallelLinear))
        if not sharded or module.weight is None:
            continue
        if not getattr(module.weight, "tensor_model_parallel", False):
            set_tensor_model_parallel_attributes(module.weight, True, dim=0, stride=1)
