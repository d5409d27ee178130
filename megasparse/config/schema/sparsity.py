"""The groups of the configuration that say which linears of a model are 2:4, and in FP8."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from megasparse.config.schema.option import option

# The words of the sparsity group, each written here alone.
RecipeName = Literal[
    "dense", "ste", "sr_ste", "fst", "fst_relaxed", "s_ste", "s_ste_3", "ast", "cast"
]
Mvue = Literal["off", "exact", "approximate"]
MvueGroups = Literal["neighbours", "strided"]
SparseGradInput = Literal["exact", "double-pruned"]
MaskMetric = Literal["magnitude", "wanda"]
OperandPacking = Literal["auto", "cusparselt"]
ScaleUpdate = Literal["frozen", "every_step"]
# What a recipe makes sparse unless the run says otherwise: the FFN.
SPARSE_LAYERS = ("*.mlp.linear_fc1", "*.mlp.linear_fc2")
# The same of a model with experts: those, shared ones, and the FFN of layers that have none.
EXPERT_SPARSE_LAYERS = ("*.mlp.*linear_fc1", "*.mlp.*linear_fc2")


@dataclass
class SparsityConfig:
    """Which layers are 2:4, by which recipe. Unset values are the recipe's own."""

    sparsity_recipe: str = option("dense", "training method", choices=get_args(RecipeName))
    sparse_layers: list[str] = option(
        list(SPARSE_LAYERS),
        "name patterns of the sparse linears, e.g. '*.self_attention.linear_*' for attention too",
    )
    mask_update_interval: int | None = option(None, "steps between mask refreshes", at_least=1)
    freeze_masks: bool | None = option(
        None,
        "keep the masks of the weights that the run starts from (--load with --finetune, "
        "--load-hf), instead of refreshing them; default: with --sft and --num-classes",
    )
    masked_decay: float | None = option(
        None,
        "decay of masked weights (lambda_W of FST, lambda of SR-STE, final value of AST and CAST)",
        at_least=0.0,
    )
    masked_decay_rho: float | None = option(
        None,
        "instead of masked-decay: lambda of each weight follows its second moments, as this times "
        "mean sqrt(v) / mean |w| over masked weights (0.05 is a good start)",
        above=0.0,
    )
    masked_decay_update_interval: int | None = option(
        None, "steps between two such lambdas of masked-decay-rho; default 100", at_least=1
    )
    masked_decay_ramp_iters: int | None = option(
        None, "steps over which the decay grows from 0 (AST's T0)", at_least=0
    )
    masked_decay_before_clipping: bool = option(
        False, "clip gradient and decay together, instead of adding the decay to the clipped one"
    )
    mvue: str | None = option(
        None,
        "how output gradients are made 2:4 for the weight gradient",
        choices=get_args(Mvue),
    )
    mvue_groups: str | None = option(
        None,
        "which four tokens share a group of MVUE: neighbours, tokens a quarter of the micro-batch "
        "apart (strided), or auto: strided where neighbours would be of one sequence, that is if "
        "4 does not divide micro-batch-size; default neighbours",
        choices=(*get_args(MvueGroups), "auto"),
    )
    sparse_grad_input: str | None = option(
        None,
        "the weight of grad_input where masks are row-wise: the forward pass's, so that its GEMM "
        "is dense (exact), or of it the two largest of each four outputs too, so that it is 2:4 "
        "(double-pruned); default exact",
        choices=get_args(SparseGradInput),
    )
    operand_packing: str | None = option(
        None,
        "who packs 2:4 operands in 16 bits: our kernels on GPUs whose layout they write, else "
        "cuSPARSELt itself (auto, the default), or always cuSPARSELt",
        choices=get_args(OperandPacking),
    )
    dense_warmup_fraction: float | None = option(
        None, "share of the steps that is dense at the start", at_least=0.0, below=1.0
    )
    dense_tail_fraction: float | None = option(
        None,
        "share of the steps that is dense at the end (FST's paper: 1/6)",
        at_least=0.0,
        below=1.0,
    )
    sparsity_phases: str | None = option(
        None,
        "the run's phases and their shares of its steps, in place of the two dense fractions, as "
        "in dense:0.1,fst:0.57,row+grad-input=exact+mvue=off:0.33: recipes, or the run's recipe "
        "with transposable, row or soft_threshold weights; options grad-input, mvue, decay",
    )
    s_ste_scale: str | None = option(
        None,
        "when S-STE's scale is computed: before the first sparse step, or anew in each; "
        "default frozen",
        choices=get_args(ScaleUpdate),
    )
    simulate_fp8: bool = option(
        False,
        "round operands of sparse layers to FP8 as S-STE's paper does (e4m3 forward, e5m2 "
        "backward); for its numerics, without speed",
    )
    mask_metric: str | None = option(
        None,
        "what row-wise masks keep the largest of: weights (magnitude), or weights times the "
        "norm of their input (wanda); default magnitude",
        choices=get_args(MaskMetric),
    )
    weight_scale_groups: int | None = option(
        None,
        "learnable scales of each row of a sparse weight, one for each of as many groups of its "
        "inputs; of the recipe cast, default 2",
        at_least=0,
    )
    slorb_k: int | None = option(
        None,
        "add SLoRB's low-rank branch to sparse layers, of rank inputs / k (AST: 16)",
        at_least=1,
    )
    slorb_train_projection: bool = option(
        True, "train SLoRB's projection too, instead of sums over groups of k inputs"
    )
    track_flip_rate: bool = option(
        True, "measure flip rates in dense phases too (masks are computed, not applied)"
    )


@dataclass
class Fp8Config:
    """FP8 GEMMs of the blocks' linears (Hopper, with Transformer Engine; by definition on CPUs)."""

    fp8_format: str | None = option(
        None,
        "compute the GEMMs of the blocks' linears, sparse or not, in 8 bits: all operands e4m3 "
        "(e4m3), or output gradients in e5m2 where their GEMM is dense (hybrid); default: in the "
        "model's precision",
        choices=("e4m3", "hybrid"),
    )
    fp8_fallback: bool = option(
        False,
        "where FP8 cannot be had (no FP8 tensor cores, float32, a size), train in the model's "
        "precision, and say why, instead of refusing",
    )
    fp8_recipe: str = option(
        "delayed",
        "what a tensor is scaled by: the largest magnitudes of earlier steps (delayed), "
        "or its own, found in one more pass over it (tensorwise, current scaling)",
        choices=("delayed", "tensorwise"),
    )
    fp8_margin: int = option(
        0, "scales are divided by 2 to the power of this (delayed)", at_least=0
    )
    fp8_amax_history_len: int = option(
        16, "optimizer steps whose largest magnitudes make a scale (delayed)", at_least=1
    )
    fp8_amax_compute_algo: str = option(
        "max", "the largest of them, or the newest (delayed)", choices=("max", "most_recent")
    )
