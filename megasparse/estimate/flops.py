"""Floating-point operations of a token, counted by formula, and the peak of the GPU in use.

A product of (T, K) by (K, N) is 2 T K N operations. Norms, activations, positions, softmax and
loss are left out, as is the embedding (a look-up). Backward has two GEMMs for each of the forward.

Three counts, per token of the sequence, over the whole model:

* dense-equivalent: what the dense model needs, whatever is sparse or recomputed. The basis of MFU
  and of every comparison of recipes.
* by the recipe: with half of the operations of each 2:4 GEMM, and what is recomputed.
* true: what was executed, with recomputation, minus what sparse tensor cores saved. Where 2:4 GEMMs
  are computed by dense ones (on a CPU, or for a shape where dense is faster) nothing was saved.

Attention is counted causal: a token sees (S + 1) / 2 keys on average, with a sliding window those
in it, which is what fused kernels compute (up to their blocks); `causal=False` counts S keys, what
plain matrix products compute. In BERT, whose tokens see all others, a token sees S keys.
"""

from __future__ import annotations

from dataclasses import dataclass

from megasparse.config import ResolvedConfig, ResolvedModel, ResolvedParallel
from megasparse.config.shapes import layer_parameters
from megasparse.sparsity.recipe import SparsityRecipe

# Dense peaks in TFLOP/s (2:4 peaks are twice as high), from NVIDIA's data sheets of each product,
# read without "with sparsity": H100 and H200 (2024), A100 (2021), B200 (2025), L40S (2023),
# GH200 (2024). Longest name first where one contains another.
PEAKS: dict[str, dict[str, float]] = {
    "H200 NVL": {"fp8": 1671.0, "bf16": 835.5, "fp32": 60.0},
    "H200": {"fp8": 1979.0, "bf16": 989.5, "fp32": 67.0},
    "GH200": {"fp8": 1979.0, "bf16": 989.5, "fp32": 67.0},
    "H100 NVL": {"fp8": 1671.0, "bf16": 835.5, "fp32": 60.0},
    "H100 PCIe": {"fp8": 1513.0, "bf16": 756.0, "fp32": 51.0},
    "H100": {"fp8": 1979.0, "bf16": 989.5, "fp32": 67.0},
    "H800": {"fp8": 1979.0, "bf16": 989.5, "fp32": 67.0},
    "B200": {"fp8": 4500.0, "bf16": 2250.0, "fp32": 75.0},
    "A100": {"bf16": 312.0, "fp32": 19.5},
    "A800": {"bf16": 312.0, "fp32": 19.5},
    "L40S": {"fp8": 733.0, "bf16": 362.0, "fp32": 91.6},
}


def peak_tflops(gpu: str, precision: str) -> float | None:
    """Dense peak of one GPU in TFLOP/s, or None for one that is not in PEAKS.

    Args:
        gpu: its name as CUDA tells it.
        precision: fp8, bf16 or fp32 (without TF32).
    """
    for name in sorted(PEAKS, key=len, reverse=True):
        if name in gpu:
            return PEAKS[name].get(precision)
    return None


@dataclass(frozen=True)
class Gemm:
    """One linear of a layer: its name, outputs N and inputs K; of experts, of one of them.

    Attributes:
        times: how often it multiplies a token: of experts, those that are chosen.
    """

    name: str
    n: int
    k: int
    times: int = 1

    @property
    def flops(self) -> float:
        """Of a token, forward."""
        return 2.0 * self.n * self.k * self.times


@dataclass(frozen=True)
class TokenFlops:
    """Operations of a token.

    Attributes:
        dense: dense-equivalent, forward and backward.
        recomputed: forward operations that are done once more, dense.
        saved: of both, what the recipe's 2:4 GEMMs leave out.
    """

    dense: float
    recomputed: float
    saved: float

    @property
    def by_recipe(self) -> float:
        """Operations with half of each 2:4 GEMM."""
        return self.dense + self.recomputed - self.saved


def layer_gemms(model: ResolvedModel, layer: int = 0) -> list[Gemm]:
    """The linears of a Transformer layer, whole (not a shard)."""
    linears = [one for one in layer_parameters(model, layer) if one.is_linear]
    chosen = model.moe_router_topk
    return [
        Gemm(one.module, one.shape[0] // one.experts, one.shape[1], chosen)
        if one.experts > 1
        else Gemm(one.module, one.shape[0], one.shape[1])
        for one in linears
    ]


def router_flops(model: ResolvedModel) -> float:
    """Forward operations of a token in the routers of all layers."""
    return 2.0 * (model.num_experts or 0) * model.hidden_size * sum(model.expert_layers)


def seen_keys(model: ResolvedModel) -> float:
    """Keys that a token sees on average over its sequence and the layers."""
    length, windowed = model.seq_length, sum(model.windowed_layers)
    window = min(model.window or length, length)
    # The first tokens see as many as there are, the others those of their window.
    near = window - window * (window - 1) / (2 * length)
    every = (length + 1) / 2
    return (windowed * near + (model.num_layers - windowed) * every) / model.num_layers


def attention_flops(model: ResolvedModel, causal: bool = True) -> float:
    """Forward operations of a token in one layer's `Q K^T` and `P V`, on average over the layers.

    Grouped queries save memory, not operations: every query head has its own products.
    """
    keys = seen_keys(model) if causal and not model.is_bert else model.seq_length
    return 4.0 * keys * model.num_attention_heads * model.kv_channels


def token_flops(
    model: ResolvedModel,
    parallel: ResolvedParallel,
    padded_vocab_size: int,
    recipe: SparsityRecipe,
    sparse_now: bool = True,
    causal: bool = True,
) -> TokenFlops:
    """Operations of a token in one phase of the schedule.

    Args:
        model, parallel: of the run.
        padded_vocab_size: rows of the output layer; its logits are computed for every token.
        recipe: which linears are 2:4, in which of the three GEMMs.
        sparse_now: False in dense phases.
        causal: how attention is counted.
    """
    attention = attention_flops(model, causal)
    kinds = {experts: number for number, experts in enumerate(model.expert_layers)}
    gemms = {experts: layer_gemms(model, number) for experts, number in kinds.items()}
    forward = model.num_layers * attention + router_flops(model)
    logits = 2.0 * padded_vocab_size * model.hidden_size
    if model.is_bert:  # its other heads compute a token of the sequence
        head = 2.0 * model.hidden_size**2
        logits = logits + head if model.num_classes is None else 0.0
    again = layers_recomputed(model, parallel) / model.num_layers
    saved = 0.0
    for layer, experts in enumerate(model.expert_layers):
        forward += sum(gemm.flops for gemm in gemms[experts])
        if not sparse_now:
            continue
        # The output GEMM runs once more in each layer that is recomputed as a whole.
        times = len(recipe.sparse_gemms) + again * ("output" in recipe.sparse_gemms)
        for gemm in gemms[experts]:
            if recipe.matches(f"{model.block}.layers.{layer}.{gemm.name}"):
                saved += times * gemm.flops / 2
    recomputed = 0.0
    if parallel.recompute_granularity == "full":
        recomputed = again * forward
    elif parallel.recompute_granularity == "selective":
        recomputed = model.num_layers * attention
    return TokenFlops(3.0 * (forward + logits), recomputed, saved)


def of_run(config: ResolvedConfig, padded_vocab_size: int, recipe: SparsityRecipe) -> TokenFlops:
    """`token_flops` of a run's sparse phase."""
    return token_flops(config.model, config.parallel, padded_vocab_size, recipe)


def layers_recomputed(model: ResolvedModel, parallel: ResolvedParallel) -> int:
    """Layers whose whole forward is done again: all of them, or (block) the first of each stage."""
    if parallel.recompute_granularity != "full":
        return 0
    if parallel.recompute_method != "block":
        return model.num_layers
    stages = parallel.pipeline_model_parallel_size
    return min(stages * parallel.recompute_chunk, model.num_layers)
