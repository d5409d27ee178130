"""Which implementation computes the GEMMs of a weight in a phase: the one place that chooses."""

from __future__ import annotations

from typing import Any

import torch

from megasparse.log import log_once, warn_once
from megasparse.sparsity.gemms import packed, packed_experts
from megasparse.sparsity.gemms.cusparselt_packed import LibrarySparseGemms
from megasparse.sparsity.gemms.dense import DenseGemms, ReferenceSparseGemms
from megasparse.sparsity.gemms.dense_fp8 import DenseFp8Gemms, OperandQuantizers
from megasparse.sparsity.gemms.experts import DenseExpertGemms, ExpertGemms, ReferenceExpertGemms
from megasparse.sparsity.gemms.fp8_experts import DenseFp8ExpertGemms
from megasparse.sparsity.gemms.packed_fp8 import PackedFp8Gemms
from megasparse.sparsity.gemms.packed_fp8_experts import PackedFp8ExpertGemms
from megasparse.sparsity.gemms.protocol import LinearGemms
from megasparse.sparsity.gemms.simulated_fp8 import SimulatedFp8Gemms
from megasparse.sparsity.probe import Probe
from megasparse.sparsity.recipe import SparsityRecipe
from megasparse.sparsity.shard import ShardSlice, TokenShare, WeightShard


def choose(
    weight: torch.Tensor,
    recipe: SparsityRecipe,
    shard: WeightShard,
    sparse: bool,
    quantizers: OperandQuantizers | None,
    hybrid: bool,
    reduce_max: object,
    probe: Probe,
    tokens: TokenShare,
    experts: int | None,
    grouped: bool,
) -> Any:
    """The best implementation that can compute a weight's GEMMs, without operands yet.

    Args:
        weight: the local master weight `(N, K)`.
        recipe: what is done to it.
        shard: where it lies in the whole.
        sparse: whether it is for the sparse phase.
        quantizers: where GEMMs are in FP8.
        hybrid: output gradients in e5m2 where their GEMM is dense.
        reduce_max: largest over the tensor-parallel group, for simulated FP8.
        probe: of the weight.
        tokens: which tokens of a micro-batch are on this rank.
        experts: whose weights are stacked in it; None: it is one linear's.
        grouped: dense GEMMs of experts are one launch.

    Returns:
        `LinearGemms`, or `ExpertGemms` of experts.
    """
    if experts is not None:
        how = (experts, recipe, shard, sparse, probe, grouped)
        if quantizers is not None:
            return _of_fp8_experts(*how, quantizers, hybrid)
        return _of_experts(*how, weight)
    if not sparse:
        if quantizers is None:
            return DenseGemms()
        return DenseFp8Gemms(quantizers, hybrid, probe)
    channels = shard.slices(0)
    if quantizers is not None:
        return PackedFp8Gemms(recipe, channels, quantizers, hybrid, probe, tokens=tokens)
    reason = packed.refusal(weight, recipe, channels)
    if reason is None:
        other = packed.layout_refusal(weight)
        if recipe.operand_packing == "auto" and other is None:
            return packed.PackedSparseGemms(recipe, channels, probe, tokens=tokens)
        reason = LibrarySparseGemms.refusal(weight)
        if reason is None:
            why = "operand_packing is cusparselt" if other is None else other
            log_once("cuSPARSELt packs the 2:4 operands itself: %s", why)
            return LibrarySparseGemms(recipe, channels, probe, tokens=tokens)
    if weight.is_cuda:
        warn_once("2:4 layers are computed by dense GEMMs, without their speed: %s", reason)
    return _by_dense_gemms(recipe, channels, reduce_max, probe, tokens)


def _by_dense_gemms(
    recipe: SparsityRecipe,
    channels: tuple[ShardSlice, ...],
    reduce_max: object,
    probe: Probe,
    tokens: TokenShare,
) -> LinearGemms:
    if recipe.simulate_fp8:
        return SimulatedFp8Gemms(recipe, channels, reduce_max, probe, tokens)  # type: ignore[arg-type]
    return ReferenceSparseGemms(recipe, channels, probe, tokens)


def _of_experts(
    experts: int,
    recipe: SparsityRecipe,
    shard: WeightShard,
    sparse: bool,
    probe: Probe,
    grouped: bool,
    weight: torch.Tensor,
) -> ExpertGemms:
    if not sparse:
        return DenseExpertGemms(experts, grouped)
    channels = channels_of_expert(shard, experts)
    reason = packed.refusal(weight, recipe, channels)
    reason = packed_experts.refusal(weight, experts, channels, reason)
    if reason is None:
        return packed_experts.PackedExpertGemms(experts, recipe, channels, probe)
    if weight.is_cuda:
        warn_once("2:4 experts are computed by dense GEMMs, without their speed: %s", reason)
    return ReferenceExpertGemms(experts, recipe, channels, probe, grouped)


def _of_fp8_experts(
    experts: int,
    recipe: SparsityRecipe,
    shard: WeightShard,
    sparse: bool,
    probe: Probe,
    grouped: bool,
    quantizers: OperandQuantizers,
    hybrid: bool,
) -> ExpertGemms:
    if not sparse:
        return DenseFp8ExpertGemms(experts, quantizers, hybrid, grouped, probe)
    channels = channels_of_expert(shard, experts)
    return PackedFp8ExpertGemms(experts, recipe, channels, quantizers, hybrid, probe=probe)


def channels_of_expert(shard: WeightShard, experts: int) -> tuple[ShardSlice, ...]:
    """Where the local outputs of one expert, the same for each, lie among its own.

    Args:
        shard: of the stacked weight.
        experts: of this rank.
    """
    rows = shard.global_shape[0] // (shard.blocks * experts)
    parts = shard.parts // experts if shard.dim == 0 else 1
    dim = 0 if shard.dim == 0 else None
    return WeightShard((rows,), dim, shard.rank, shard.world, parts).slices(0)
