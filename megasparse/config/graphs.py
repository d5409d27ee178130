"""Whether the settings of a run let its layers be captured in CUDA graphs."""

from __future__ import annotations

from megasparse.config.resolved import ResolvedConfig

# Measured on H200s with Transformer Engine 2.20: captured, the backward pass of its attention gives
# other gradients than eagerly, or reads memory that is not there, unless this divides a sequence.
ATTENTION_TILE = 128


def attention_may_be_fused(config: ResolvedConfig) -> bool:
    """Whether Transformer Engine computes attention, where it is installed."""
    return config.train.bf16 and config.train.transformer_impl != "local"


def graphs_refusal(config: ResolvedConfig) -> str | None:
    """Why the layers of a run on GPUs cannot be captured, or None."""
    parallel, model = config.parallel, config.model
    dropout = max(model.hidden_dropout, model.attention_dropout)
    reasons = (
        (config.train.cuda_graph_impl == "none", "cuda_graph_impl is none"),
        (model.is_bert, "model_type is bert: attention's padding masks were never captured"),
        (
            parallel.zero_stage == 3,
            "ZeRO 3 gathers weights to other addresses in every micro-batch",
        ),
        (
            model.seq_length % ATTENTION_TILE != 0 and attention_may_be_fused(config),
            f"seq_length {model.seq_length} is no multiple of {ATTENTION_TILE}: the gradients of "
            "Transformer Engine's attention would be wrong in a graph",
        ),
        (
            parallel.context_parallel_size > 1,
            "context_parallel_size is above 1, and attention's exchange between ranks runs on "
            "streams of its own",
        ),
        (
            model.num_experts is not None and parallel.recompute_granularity == "full",
            "layers with experts are recomputed: how many tokens each expert gets is not known "
            "before, and the host waits for it",
        ),
        (
            model.num_experts is not None and parallel.pipeline_model_parallel_size > 1,
            "a pipeline of layers with experts was never captured",
        ),
        (
            model.num_experts is not None and model.parallel_residual,
            "experts beside attention (parallel_residual) were never captured",
        ),
        (
            config.sparsity.sparsity_recipe == "cast",
            "the recipe cast makes its weights anew in each pass",
        ),
        (parallel.recompute_granularity == "selective", "recompute_granularity is selective"),
        (dropout > 0.0, f"dropout is {dropout:g}, whose random states graphs would freeze"),
    )
    return next((text for holds, text in reasons if holds), None)
