"""How many parameters and bytes a rank holds, from the configuration alone.

`config/shapes.py` lists every parameter; everything else follows:

    state         parameters, optimizer (ZeRO-1 and 2: float32 masters and moments over the data
                  and context parallel ranks), the tensors in which gradients are added up (ZeRO 0
                  and 1), masks, operands made of weights               exact, between two steps
    gradients     of ZeRO 2 and 3: a rank's share
    activations   what autograd keeps, from the operators of a layer, times micro-batches in flight
    workspace     reduce buckets, logits and their gradient, keys and values of other ranks,
                  temporaries

Bytes throughout. Activations and workspace are estimates: kernels differ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megasparse.config import (
    ResolvedConfig,
    gradient_accumulation_steps,
    pipeline_split,
    replicas,
    tokens_here,
)
from megasparse.config.shapes import layer_parameters, stage_parameters
from megasparse.estimate import context
from megasparse.sparsity.recipe import SparsityRecipe

REDUCE_BUCKET = 500_000_000  # entries; DeepSpeed's default
FLOAT32 = 4


@dataclass(frozen=True)
class Weight:
    """A parameter of one rank: name in the whole model, local shape, whether it is 2:4, whether it
    is a linear's of a block, and whether it is of experts that data-parallel ranks share."""

    name: str
    shape: tuple[int, ...]
    sparse: bool = False
    linear: bool = False
    divided: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Footprint:
    """One rank's bytes by what they are for, and its parameters.

    Attributes:
        parameters, sparse_parameters: on this rank.
        state: held between two steps; exact.
        transient: comes and goes within a step; estimated.
    """

    stage: int
    parameters: int
    sparse_parameters: int
    state: dict[str, int]
    transient: dict[str, int]

    @property
    def state_bytes(self) -> int:
        return sum(self.state.values())

    @property
    def peak_bytes(self) -> int:
        return self.state_bytes + sum(self.transient.values())


def stage_weights(
    config: ResolvedConfig, recipe: SparsityRecipe, vocabulary: int, stage: int
) -> list[Weight]:
    """The parameters of a rank of this pipeline stage (a tied copy included).

    Args:
        config: of the run.
        vocabulary: padded.
    """
    tp = config.parallel.tensor_model_parallel_size
    ep = config.parallel.expert_model_parallel_size
    return [
        Weight(
            one.name,
            one.local_shape(tp, ep),
            one.is_linear and recipe.matches(one.module),
            one.is_linear,
            one.experts > 1 and ep > 1,
        )
        for one in stage_parameters(config, vocabulary, stage)
    ]


def footprint(
    config: ResolvedConfig,
    recipe: SparsityRecipe,
    vocabulary: int,
    world: int,
    stage: int = 0,
    gpu: bool = True,
) -> Footprint:
    """The bytes of a rank of a pipeline stage.

    Args:
        config: for `world` ranks.
        vocabulary: padded.
        gpu: a Hopper GPU with Transformer Engine: operands are packed for the sparse tensor cores,
            and the cross entropy is fused.
    """
    weights = stage_weights(config, recipe, vocabulary, stage)
    numel = sum(weight.numel for weight in weights)
    sparse = sum(weight.numel for weight in weights if weight.sparse)
    dp, zero = replicas(config, world), config.parallel.zero_stage
    size = 2 if config.train.bf16 else FLOAT32
    groups = _groups(weights, dp, config.parallel.expert_model_parallel_size)
    shares = [-(-group // (2 * ranks)) * 2 for group, ranks in groups]
    shard = sum(shares) if zero else numel
    whole = sum(share * ranks for share, (_, ranks) in zip(shares, groups, strict=True))
    added = FLOAT32 if config.parallel.accumulate_allreduce_grads_in_fp32 else size
    state = {
        "parameters": size * numel,
        "gradients": 0 if zero >= 2 else added * (whole if zero else numel),
        "optimizer": (3 if zero else 2) * FLOAT32 * shard,
        "masks": sparse if recipe.is_sparse else 0,
        "operands": max(
            _operands(config, phase.recipe, weights, size, gpu and config.train.bf16)
            for phase in recipe.phases
        ),
    }
    transient = {
        # For the update: ZeRO's shards, or the copy of a sum that is not in float32.
        "gradient copies": added * shard if zero >= 2 else (FLOAT32 - added) * shard,
        "activations": activations(config, world, stage, gpu),
        "workspace": workspace(config, vocabulary, numel, stage, gpu),
    }
    return Footprint(stage, numel, sparse, state, transient)


def activations(config: ResolvedConfig, world: int, stage: int, gpu: bool = True) -> int:
    """What autograd keeps for the micro-batches that a stage has in flight."""
    parallel = config.parallel
    tokens = tokens_here(config)
    stages = parallel.pipeline_model_parallel_size
    in_flight = min(stages - stage, gradient_accumulation_steps(config, world))
    split = pipeline_split(config)
    first, layers = sum(split[:stage]), split[stage]
    each = [layer_activations(config, gpu, first + number) for number in range(layers)]
    layer = max(each)
    size = 2 if config.train.bf16 else FLOAT32
    if parallel.recompute_granularity == "full":
        kept = size * tokens * config.model.hidden_size // _sequence_split(config)
        chunk = parallel.recompute_chunk
        if parallel.recompute_method == "block":
            once = chunk * kept + sum(each[chunk:])
            return in_flight * once + layer
        return in_flight * -(-layers // chunk) * kept + chunk * layer
    return in_flight * sum(each)


def layer_activations(config: ResolvedConfig, gpu: bool = True, layer: int = 0) -> int:
    """What autograd keeps of one layer for one micro-batch.

    Inputs and results of the norms; q, k and v, rotated, and the angles; the attention's result and
    its log-sums; the FFN's input (both halves of SwiGLU's) and its activation. A linear
    in FP8 keeps its input transposed in 8 bits, unless sequence parallelism gathers it again; the
    attention keeps its own result beside that. Of experts see `_expert_activations`.

    Args:
        layer: its number.
    """
    model, parallel = config.model, config.parallel
    tp = parallel.tensor_model_parallel_size
    tokens = tokens_here(config)
    size = 2 if config.train.bf16 else FLOAT32
    heads = model.num_attention_heads * model.kv_channels // tp
    groups = model.num_query_groups * model.kv_channels // tp
    rotary = model.position_embedding_type == "rope"
    split = tokens // _sequence_split(config)
    rms = model.normalization == "RMSNorm"
    fp8 = fp8_linears(config)
    norms = 0
    for linear in ("self_attention.linear_qkv", "mlp.linear_fc1"):
        given = 1 if linear in fp8 and not parallel.sequence_parallel else size
        kept = (size + given) * model.hidden_size + FLOAT32 * (1 if rms else 2)
        if not gpu and given == 1:  # quantized by the norm, whose statistics are computed again
            kept = (size + given) * model.hidden_size
        elif rms and not gpu:  # several operators there: the norm keeps two float32 copies too
            kept = (given + 2 * FLOAT32) * model.hidden_size + FLOAT32
        norms += kept
    norms *= {"pre": 1, "post": 1, "both": 2}[model.norm_placement]
    dropped = model.hidden_size if model.hidden_dropout else 0
    # Views keep the whole of what they are cut from.
    attention = heads + 2 * groups + heads
    if model.qk_layernorm:  # what the norms are given, and what they give
        attention += heads + groups
    if not gpu:  # which keeps those that it has gathered
        attention += 2 * groups * (parallel.context_parallel_size - 1)
    length = model.seq_length // parallel.context_parallel_size
    angles = FLOAT32 * length * model.kv_channels if rotary else 0
    if parallel.recompute_granularity == "selective":
        attention -= heads
    if model.expert_layers[layer]:
        ffn = _expert_activations(config, size, 1 if fp8 else size)
    else:
        ffn = size * (2 if model.gated else 1) * model.ffn_hidden_size // tp
        ffn += (1 if "mlp.linear_fc2" in fp8 else size) * model.ffn_hidden_size // tp
    log_sums = FLOAT32 * model.num_attention_heads // tp
    result = heads if "self_attention.linear_proj" in fp8 else 0
    inner = size * attention + result + ffn + log_sums
    return split * (norms + 2 * dropped) + tokens * inner + angles


def _expert_activations(config: ResolvedConfig, size: int, of_inputs: int) -> int:
    """Bytes of a token that autograd keeps of a mixture of experts, if tokens come evenly.

    Of each chosen expert its input, fc1's result, the activation times the probability, where it is
    not gated the activation too, and fc2's result; of the router logits and probabilities of all
    experts.

    Args:
        of_inputs: bytes of an entry of a linear's input.
    """
    model, tp = config.model, config.parallel.tensor_model_parallel_size
    gated, width = 2 if model.gated else 1, model.expert_width // tp
    chosen = size * (model.hidden_size + 2 * width)
    chosen += of_inputs * (model.hidden_size + width)
    shared = (size * gated + of_inputs) * (model.moe_shared_expert_intermediate_size or 0) // tp
    return model.moe_router_topk * chosen + shared + 3 * FLOAT32 * (model.num_experts or 0)


def fp8_linears(config: ResolvedConfig) -> set[str]:
    """Names within a layer of the linears whose GEMMs are in 8 bits: all or none."""
    if config.fp8.fp8_format is None:
        return set()
    return {one.module for one in layer_parameters(config.model) if one.is_linear}


def workspace(
    config: ResolvedConfig, vocabulary: int, numel: int, stage: int, gpu: bool = True
) -> int:
    """Buffers of a step: gradient buckets, what context parallelism receives; on the last stage the
    logits."""
    parallel = config.parallel
    size = 2 if config.train.bf16 else FLOAT32
    added = FLOAT32 if parallel.accumulate_allreduce_grads_in_fp32 else size
    total = added * min(REDUCE_BUCKET, numel) if parallel.zero_stage >= 2 else 0
    total += context.buffers(config, size)
    if stage == parallel.pipeline_model_parallel_size - 1:
        tokens = tokens_here(config)
        shard = tokens * vocabulary // parallel.tensor_model_parallel_size
        # As the layer gives them; a copy of the same type, which becomes their gradient
        # (megatron/loss.py), or their softmax in float32 and then their gradient.
        fused = gpu and config.train.bf16
        total += shard * (size + size if fused else size + FLOAT32 + size)
    return total


def _groups(weights: list[Weight], dp: int, ep: int) -> list[tuple[int, int]]:
    """Entries of the optimizer's groups (`optim/adamw.py`), and the ranks that ZeRO divides each
    over: of experts those that hold the same."""
    found: dict[tuple[bool, bool, bool], int] = {}
    for weight in weights:
        vector = len(weight.shape) == 1
        kind = (weight.divided, weight.sparse and not vector, vector)
        found[kind] = found.get(kind, 0) + weight.numel
    return [(entries, dp // ep if divided else dp) for (divided, _, _), entries in found.items()]


def _operands(
    config: ResolvedConfig, recipe: SparsityRecipe, weights: list[Weight], size: int, packed: bool
) -> int:
    """Weights as the GEMMs of a step read them. W~: packed values and metadata (9/16 of 16 bits,
    5/8 of 8 bits; W~^T too where it is 2:4, else in 8 bits a dense transpose), or dense. Dense
    weights: nothing beside the parameters, or both orders in 8 bits."""
    sparse = sum(weight.numel for weight in weights if weight.sparse)
    both = "grad_input" in recipe.sparse_gemms
    if config.fp8.fp8_format is not None:
        dense = sum(weight.numel for weight in weights if weight.linear and not weight.sparse)
        return sparse * (10 if both else 13) // 8 + 2 * dense
    if not recipe.is_sparse:
        return 0
    if packed and not recipe.simulate_fp8:
        return (2 if both else 1) * sparse * size * 9 // 16
    # Beside W~ what of it grad_input multiplies, if that is less.
    return (2 if recipe.double_pruned else 1) * sparse * size


def _sequence_split(config: ResolvedConfig) -> int:
    parallel = config.parallel
    return parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
