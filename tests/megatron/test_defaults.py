"""What is on, and how much, where nobody says anything: a default that changes is noticed."""

from __future__ import annotations

from tests.defaults import check

# A switch that is not here is off.
WRITTEN: dict[str, dict[str, object]] = {
    "megatron.balance": {
        "begin_step(context)": 1,
    },
    "megatron.blocks.experts": {
        "PlacesByAllGather.segment_tokens": 1,
        "PlacesByAlltoAll.segment_tokens": 1,
    },
    "megatron.comm.linear": {
        "GatherOverSequence.gathers": True,
        "LEAST_OWN_TOKENS": 1024,
    },
    "megatron.consistency": {
        "_CHUNK": 2**22,
        "_FACTOR_1": 0xBF58476D1CE4E5B9 - 2**64,
        "_FACTOR_2": 0x94D049BB133111EB - 2**64,
        "_GAMMA": 0x9E3779B97F4A7C15 - 2**64,
    },
    "megatron.data.datasets": {
        "SampleOptions(attention_masks)": True,
        "_EXACT_COUNT": 2**20,
    },
    "megatron.data.masked": {
        "UNKNOWN_ORDER": -1,
    },
    "megatron.distillation": {
        "vocab_parallel_kl(temperature)": 1.0,
    },
    "megatron.graphs.layer_graphs": {
        "FIRST_PATIENCE": 4,
        "LEAST_SHARE_ASSUMED": 0.8,
        "LayerGraphs(slots)": 1,
    },
    "megatron.grid": {
        "make_grid(context_parallel_size)": 1,
        "make_grid(expert_model_parallel_size)": 1,
        "make_grid(pipeline_model_parallel_size)": 1,
        "make_grid(timeout_minutes)": 10.0,
    },
    "megatron.inference": {
        "CachedDecoder(batch_size)": 1,
    },
    "megatron.parallel_linear": {
        "SparseColumnParallelLinear(bias)": True,
        "SparseColumnParallelLinear(stride)": 1,
        "SparseRowParallelLinear(bias)": True,
        "SparseRowParallelLinear(input_is_parallel)": True,
        "SparseRowParallelLinear(stride)": 1,
    },
    "megatron.sparsify": {
        "BLOCK": 4,
        "sparsify(monitor)": True,
        "sparsify(num_layers)": 0,
        "sparsify(slorb_train_projection)": True,
    },
    "megatron.spec": {
        "LayerStyle(causal)": True,
        "LayerStyle(groups)": 0,
        "LayerStyle(heads)": 0,
    },
    "megatron.standalone": {
        "AutomaticController(monitor)": True,
        "ENDLESS": 2**62,
        "sparsify_model(monitor)": True,
        "sparsify_model(seed)": 1234,
    },
}


def test_defaults_are_as_written():
    check("megatron", WRITTEN)
