"""What ties the settings of experts together: refusals, and what is not done for them."""

from __future__ import annotations

from collections.abc import Iterator

from megasparse.config.batches import expert_segment
from megasparse.config.resolved import ResolvedConfig, ResolvedModel, replicas

# Settings of experts; set without any they say nothing.
SETTINGS = (
    "moe_ffn_hidden_size", "moe_router_pre_softmax", "moe_aux_loss_coeff", "moe_z_loss_coeff",
    "moe_shared_expert_intermediate_size", "moe_shared_expert_gate",
)  # fmt: skip
BLOCK = 4


def check_experts(config: ResolvedConfig, world_size: int) -> Iterator[str]:
    """What is wrong with the experts of a run, one line each."""
    model, parallel = config.model, config.parallel
    tp, ep = parallel.tensor_model_parallel_size, parallel.expert_model_parallel_size
    if model.num_experts is None:
        for name in SETTINGS:
            if value := getattr(model, name):
                yield f"{name} {value} needs num_experts"
        if ep > 1:
            yield f"expert_model_parallel_size {ep} needs num_experts"
        if parallel.moe_grouped_gemm:
            yield "moe_grouped_gemm True needs num_experts"
        return
    yield from check_expert_model(model)
    if parallel.expert_tensor_parallel_size not in (None, tp):
        yield (
            f"expert_tensor_parallel_size {parallel.expert_tensor_parallel_size} is not supported, "
            f"expected that of all layers, tensor_model_parallel_size {tp}"
        )
    if model.num_experts % ep:
        yield f"num_experts {model.num_experts} is not divisible by expert_model_parallel_size {ep}"
    if replicas(config, world_size) % ep:
        yield (
            f"the data parallel size x context_parallel_size {replicas(config, world_size)} is not "
            f"divisible by expert_model_parallel_size {ep}"
        )
    length, cp = model.seq_length, parallel.context_parallel_size
    chunk, segment = length // (2 * cp), expert_segment(length)
    if cp > 1 and chunk % segment:
        yield (
            f"num_experts with context_parallel_size {cp} and seq_length {length}: a rank's chunks "
            f"of {chunk} tokens cut segments of {segment}, in which MVUE groups the tokens of "
            "experts; expected whole ones"
        )
    if tp > 1 and not parallel.sequence_parallel:
        yield (
            f"num_experts with tensor_model_parallel_size {tp} needs sequence_parallel: every rank "
            "routes tokens of its own"
        )
    for name, width in (
        ("moe_ffn_hidden_size", model.expert_width),
        ("moe_shared_expert_intermediate_size", model.moe_shared_expert_intermediate_size or 0),
    ):
        if width % (BLOCK * tp):
            yield (
                f"{name} {width} over tensor_model_parallel_size {tp} leaves a shard that cuts a "
                f"{BLOCK}x{BLOCK} block; expected a multiple of {BLOCK * tp}"
            )
    yield from _not_done(config)


def check_expert_model(model: ResolvedModel) -> Iterator[str]:
    """What is wrong with the experts of a model, whatever the run."""
    assert model.num_experts is not None
    if model.moe_router_topk > model.num_experts:
        yield f"moe_router_topk {model.moe_router_topk} of num_experts {model.num_experts}"
    if model.moe_router_topk == 1 and not model.moe_router_pre_softmax:
        yield "moe_router_topk 1 needs moe_router_pre_softmax: of one expert a softmax is 1"
    if not model.disable_bias_linear:
        yield "num_experts needs disable_bias_linear: experts have no biases"
    if model.moe_shared_expert_gate and model.moe_shared_expert_intermediate_size is None:
        yield "moe_shared_expert_gate needs moe_shared_expert_intermediate_size"
    if model.moe_router_load_balancing_type == "none" and model.moe_aux_loss_coeff:
        yield (
            f"moe_aux_loss_coeff {model.moe_aux_loss_coeff} with moe_router_load_balancing_type "
            "none, expected aux_loss or seq_aux_loss"
        )
    try:
        layers = model.expert_layers
    except ValueError as error:
        yield f"moe_layer_freq {error}"
    else:
        if not any(layers):
            yield f"moe_layer_freq {model.moe_layer_freq}: no layer has experts"


def _not_done(config: ResolvedConfig) -> Iterator[str]:
    """What other layers have and experts have not."""
    sparsity = config.sparsity
    reasons = (
        (sparsity.simulate_fp8, "simulate_fp8"),
        (sparsity.mask_metric == "wanda", "mask_metric wanda"),
        (sparsity.sparsity_recipe == "cast", "sparsity_recipe cast"),
        (sparsity.slorb_k is not None, f"slorb_k {sparsity.slorb_k}"),
        (config.parallel.zero_stage >= 2, f"zero_stage {config.parallel.zero_stage}"),
        (
            config.parallel.recompute_granularity == "selective",
            "recompute_granularity selective",
        ),
        (bool(config.distillation.kd_loss_weight), "kd_loss_weight"),
        (sparsity.masked_decay_rho is not None, f"masked_decay_rho {sparsity.masked_decay_rho}"),
        (config.model.is_bert, "model_type bert"),
    )
    for holds, name in reasons:
        if holds:
            yield f"{name} with num_experts is not supported"
