"""What is on, and how much, where nobody says anything: a default that changes is noticed."""

from __future__ import annotations

from tests.defaults import check

# A switch that is not here is off.
WRITTEN: dict[str, dict[str, object]] = {
    "sparsity.autograd.experts": {
        "expert_feed_forward(seeds)": (0, 0),
    },
    "sparsity.autograd.linear": {
        "linear(seed)": 0,
    },
    "sparsity.automatic.run": {
        "Run(monitor)": True,
    },
    "sparsity.clock": {
        "Clock(batch)": 0,
        "Clock(micro_batch)": 0,
        "Clock(samples)": 0,
        "Clock(slot)": 0,
        "Clock(step)": 0,
    },
    "sparsity.controller": {
        "SparsityController(monitor)": True,
    },
    "sparsity.decay_choice": {
        "FEASIBLE": (0.6, 0.95),
    },
    "sparsity.gemms.choice": {
        "Choice(rejected)": 0,
        "FINALISTS": 4,
        "GemmChooser.choose(least)": 2**31,
        "MAX_ALGORITHMS": 64,
        "MAX_ERROR": 1e-2,
        "MIN_FLOPS": 2**31,
        "_CYCLES_PER_SECOND": 2e9,
        "_LONGEST_WAIT": 0.1,
    },
    "sparsity.gemms.dense_fp8": {
        "ALIGNMENT": 128,
        "DenseFp8Gemms._quantized_input(record)": True,
        "DenseFp8Gemms.output_and_saved(save)": True,
    },
    "sparsity.gemms.expert_products": {
        "SIDE_STREAMS": 4,
    },
    "sparsity.gemms.expert_tokens": {
        "Arrivals(first)": 0,
        "Arrivals(tokens)": 1,
        "Arrivals(total)": 1,
    },
    "sparsity.gemms.experts": {
        "DenseExpertGemms.tile": 1,
    },
    "sparsity.gemms.fp8_experts": {
        "DenseFp8ExpertGemms.tile": 128,
    },
    "sparsity.gemms.packed": {
        "ALIGNMENT": 64,
    },
    "sparsity.gemms.packed_experts": {
        "PackedExpertGemms.tile": 64,
        "TILE": 64,
    },
    "sparsity.gemms.packed_fp8": {
        "MVUE_HEADROOM": 4.0,
    },
    "sparsity.gemms.packed_fp8_experts": {
        "PackedFp8ExpertGemms(grouped)": True,
    },
    "sparsity.gemms.protocol": {
        "LinearGemms.output_and_saved(save)": True,
        "PlainOperands.output_and_saved(save)": True,
    },
    "sparsity.probe": {
        "NOTHING": -1.0,
    },
    "sparsity.recipe": {
        "SparsityRecipe(dense_tail_fraction)": 0.0,
        "SparsityRecipe(dense_warmup_fraction)": 0.0,
        "SparsityRecipe(mask_update_interval)": 1,
        "SparsityRecipe(masked_decay)": 0.0,
        "SparsityRecipe(masked_decay_ramp_iters)": 0,
        "SparsityRecipe(masked_decay_update_interval)": 100,
        "SparsityRecipe(weight_scale_groups)": 0,
    },
    "sparsity.schedule": {
        "refresh_due(first_sparse_step)": 0,
    },
    "sparsity.seeds": {
        "DeviceSeeds(slots)": 1,
        "DeviceSeeds.begin_micro_batch(slot)": 0,
        "DeviceSeeds.of(slot)": 0,
    },
    "sparsity.shard": {
        "TokenShare(rank)": 0,
        "TokenShare(size)": 1,
        "WeightShard(block)": 0,
        "WeightShard(blocks)": 1,
        "WeightShard(parts)": 1,
        "WeightShard(rank)": 0,
        "WeightShard(world)": 1,
    },
}


def test_defaults_are_as_written():
    check("sparsity", WRITTEN)
