"""Whether the settings of a run let its layers be captured in CUDA graphs."""

from __future__ import annotations

from megasparse.config.resolved import ResolvedConfig


def graphs_refusal(config: ResolvedConfig) -> str | None:
    """Why the layers of a run on GPUs cannot be captured, or None."""
    parallel, model = config.parallel, config.model
    dropout = max(model.hidden_dropout, model.attention_dropout)
    reasons = (
        (config.train.cuda_graph_impl == "none", "cuda_graph_impl is none"),
        (
            parallel.zero_stage == 3,
            "ZeRO 3 gathers weights to other addresses in every micro-batch",
        ),
        (parallel.recompute_granularity == "selective", "recompute_granularity is selective"),
        (dropout > 0.0, f"dropout is {dropout:g}, whose random states graphs would freeze"),
        (
            parallel.pipeline_model_parallel_size > 1 and parallel.zero_stage >= 2,
            "a pipeline adds gradients up by itself",
        ),
    )
    return next((text for holds, text in reasons if holds), None)
