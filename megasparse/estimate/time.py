"""How long a training step takes on GPUs, from measured rates of its parts (BF16 and FP8).

The parts of a micro-batch on one rank: the three GEMMs of every linear, by the nearest measured
shape; attention; what runs at memory bandwidth (norms, activations, operands of sparse and of FP8
layers, the loss); the collectives of tensor parallelism, and what of context parallelism's exchange
attention does not hide. While the device computes them the host
launches them: a micro-batch takes as long as the slower of the two. Then the pipeline's bubble, the
reduction of gradients, and the optimizer.
"""

from __future__ import annotations

from dataclasses import dataclass

from megasparse.config import (
    ResolvedConfig,
    gradient_accumulation_steps,
    pipeline_split,
    replicas,
    tokens_here,
)
from megasparse.config.graphs import graphs_refusal
from megasparse.estimate import context
from megasparse.estimate.flops import seen_keys
from megasparse.estimate.gemm_table import GemmTable
from megasparse.estimate.linears import dispatch_seconds, layer_kinds, linears, not_fused
from megasparse.estimate.memory import layer_activations, stage_weights
from megasparse.sparsity.recipe import SparsityRecipe

SIZE = 2  # bytes of bf16
QKV, FC1, FC2 = (
    f"{name}.weight" for name in ("self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2")
)

# What follows describes this code as tools/bench/layer.py and train.py found it (H200,
# 2026-11-23): kernels' times at copy bandwidth, and launches.

# Times that a kept activation passes through memory besides the GEMMs.
PASSES = 5.3
# A parameter, in the update and around it: 31 bytes for master, moments, gradient, mask and result;
# the gradient's norm and zeroing it.
OPTIMIZER_BYTES = 40
# Its gradient of a micro-batch, added in float32: by captured layers, and by autograd, which makes
# a float32 copy of it first.
ADDED_BYTES = {"captured": 10, "eager": 18}
MASK_BYTES = 8  # an entry of a mask that is searched anew, replaces the old one and is compared
LOGITS_BYTES = 12  # an entry, in the fused cross entropy, both ways
# A weight's W~ made again for a dense grad_input of a row-wise recipe in BF16.
REMAKE_BYTES = {"row": 5, "soft_threshold": 43}
GRAPH_LAUNCHES = 2  # of a captured layer in a micro-batch, both ways
# What the host does from the update of a step to the next one's first kernels, while the device has
# nothing to do: for a step, and for each layer's states.
STEP_HOST_SECONDS, LAYER_HOST_SECONDS = 3e-3, 5e-4
LAYER_LAUNCHES = 52  # of a dense layer in a micro-batch, both ways
SPARSE_LAUNCHES = 2  # more for each linear that is sparse or in FP8
WEIGHT_LAUNCHES = 8  # and for its weight, once a step
# A collective costs the host about twice as much as a kernel: by steps of tensor parallelism with 4
# sequences a micro-batch, where the device waits for the host (a layer 7.6 ms dense, 8.4 FST).
COLLECTIVE_LAUNCHES = 2
MICRO_BATCH_LAUNCHES = 50  # embedding, output layer, loss
AFTER = ("gradient reduction", "optimizer", "between steps")  # when all micro-batches are through


@dataclass(frozen=True)
class StepTime:
    """One optimizer step.

    Attributes:
        parts: seconds of the device, by part.
        host: seconds to launch all micro-batches.
    """

    parts: dict[str, float]
    host: float

    @property
    def waiting(self) -> float:
        """Seconds that the device waits for the host."""
        busy = sum(s for name, s in self.parts.items() if name not in AFTER)
        return max(self.host - busy, 0.0)

    @property
    def device(self) -> float:
        """Seconds of the device's work."""
        return sum(self.parts.values())

    @property
    def seconds(self) -> float:
        """The prediction."""
        return self.device + self.waiting


def step_time(
    config: ResolvedConfig,
    recipe: SparsityRecipe,
    vocabulary: int,
    world: int,
    table: GemmTable,
    gpus_per_node: int = 8,
) -> StepTime:
    """The predicted time of a step of the sparse phase.

    Args:
        config: for `world` ranks.
        vocabulary: padded.
    """
    parallel = config.parallel
    tp, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    dp = replicas(config, world)
    micro_batches = gradient_accumulation_steps(config, world)
    split = pipeline_split(config)
    layer = _mean_layer(config, recipe, micro_batches, table, gpus_per_node)
    # The slowest stage sets the pace: the last one has the output layer.
    busiest = {name: seconds * max(split) for name, seconds in layer.items()}
    last = {name: seconds * split[-1] for name, seconds in layer.items()}
    last["logits"] = _output(config, vocabulary, table)
    pace = max(busiest, last, key=lambda parts: sum(parts.values()))
    parts = {name: seconds * micro_batches for name, seconds in pace.items()}
    parts["pipeline bubble"] = sum(pace.values()) * (stages - 1)
    found = stage_weights(config, recipe, vocabulary, 0)
    weights = sum(w.numel for w in found)
    experts = sum(w.numel for w in found if w.divided)
    alike = dp // parallel.expert_model_parallel_size
    link = "nvlink" if tp * dp <= gpus_per_node else "network"
    captured = graphs_refusal(config) is None
    # Gradients to the rank that updates in float32, new weights from it.
    travel = (weights - experts) * (dp - 1) / dp + experts * (alike - 1) / alike
    parts["gradient reduction"] = table.moving((4 + SIZE) * travel, link)
    eager = sum(w.numel for w in found if ".experts." in w.name) if captured else weights
    added = ADDED_BYTES["captured"] * (weights - eager) + ADDED_BYTES["eager"] * eager
    parts["gradients"] = table.moving(added) * micro_batches
    updated = (weights - experts) / dp + experts / alike
    parts["optimizer"] = table.moving(OPTIMIZER_BYTES * updated)
    slower = table.data["in_a_step"]["step"]
    each = [
        layer_launches(config, recipe, micro_batches, number)
        for number in layer_kinds(config).values()
    ]
    launches = max(split) * max(each) + MICRO_BATCH_LAUNCHES
    host = launches * (micro_batches + stages - 1) * table.data["launch_us"] / 1e6
    if captured:
        parts["between steps"] = STEP_HOST_SECONDS + max(split) * LAYER_HOST_SECONDS
    return StepTime({name: seconds * slower for name, seconds in parts.items()}, host)


def _mean_layer(
    config: ResolvedConfig,
    recipe: SparsityRecipe,
    micro_batches: int,
    table: GemmTable,
    gpus_per_node: int,
) -> dict[str, float]:
    """`layer_time` on average over layers with experts and without."""
    model, parts = config.model, dict[str, float]()
    for experts, number in layer_kinds(config).items():
        share = model.expert_layers.count(experts) / model.num_layers
        one = layer_time(config, recipe, micro_batches, table, gpus_per_node, number)
        parts = {n: parts.get(n, 0.0) + share * one.get(n, 0.0) for n in {**parts, **one}}
    return parts


def layer_time(
    config: ResolvedConfig,
    recipe: SparsityRecipe,
    micro_batches: int,
    table: GemmTable,
    gpus_per_node: int = 8,
    layer: int = 0,
) -> dict[str, float]:
    """Seconds of the device in one layer for one micro-batch, forward and backward, by part.

    Args:
        micro_batches: of a step, among which the work of once a step is divided.
        layer: its number.
    """
    model, parallel = config.model, config.parallel
    tp = parallel.tensor_model_parallel_size
    tokens = tokens_here(config)
    sparse = _sparse(config, recipe)
    parts = {"GEMMs": 0.0, "operands": 0.0}
    forward = 0.0
    for one in linears(config, layer):
        name, t, n, k, times = one.name, one.tokens, one.n, one.k, one.times
        chosen = recipe.sparse_gemms if name in sparse else ()
        dtype = "fp8" if config.fp8.fp8_format else "bf16"
        output = times * table.seconds(t, n, k, "output" in chosen, dtype)
        forward += output
        parts["GEMMs"] += output
        parts["GEMMs"] += times * table.seconds(t, k, n, "grad_input" in chosen, dtype)
        parts["GEMMs"] += times * table.seconds(k, n, t, "grad_weight" in chosen, dtype)
        if dtype == "fp8":
            apart, shape = _quantized_apart(config, name), (t, n, k)
            parts["operands"] += times * (
                _operands_fp8(recipe, shape, micro_batches, table, apart)
                if name in sparse
                else _operands_dense_fp8(shape, micro_batches, table, apart[0])
            )
        elif name in sparse:
            operands = _operands_bf16(recipe, (t, n, k), micro_batches, table)
            parts["operands"] += times * operands
    heads = model.num_attention_heads * model.kv_channels // tp
    flops = 4.0 * tokens * seen_keys(model) * heads
    attention = flops / (table.data["attention_tflops"] * 1e12)
    parts["attention"] = 3.5 * attention
    moved = PASSES * layer_activations(config, layer=layer)
    parts["memory"] = table.moving(moved)
    if parallel.recompute_granularity == "full":
        parts["recomputation"] = forward + attention + table.moving(moved) * 2 / PASSES
    elif parallel.recompute_granularity == "selective":
        parts["recomputation"] = attention
    parts["memory"] += table.moving(not_fused(config))
    if tp > 1:
        parts["tensor parallel"] = _collectives(config, table, gpus_per_node)
    if (cp := parallel.context_parallel_size) > 1:
        link = "nvlink" if tp * cp <= gpus_per_node else "network"
        travelling = table.moving(context.exchanged(config), link)
        travelling += context.TRIPS * (cp - 1) * table.data["collective_us"] / 1e6
        parts["context parallel"] = context.exposed_seconds(config, travelling, parts["attention"])
    if model.expert_layers[layer] and parallel.expert_model_parallel_size > 1:
        parts["expert parallel"] = dispatch_seconds(config, table, gpus_per_node)
    return parts


def _collectives(config: ResolvedConfig, table: GemmTable, gpus_per_node: int) -> float:
    """Seconds of a layer's gathers and sums before and after two pairs of linears, both ways."""
    tp = config.parallel.tensor_model_parallel_size
    link = "nvlink" if tp <= gpus_per_node else "network"
    tokens = tokens_here(config)
    halves = 4.0 * 2  # sums of whole tensors: a reduction and a gather each
    count = 4
    if config.parallel.sequence_parallel:
        # X (in FP8 half of its bytes) twice, z, dz and dX of each pair.
        halves, count = (8.0 if config.fp8.fp8_format else 10.0), 10
    moved = halves * SIZE * tokens * config.model.hidden_size * (tp - 1) / tp
    return table.moving(moved, link) + count * table.data["collective_us"] / 1e6


def layer_launches(
    config: ResolvedConfig, recipe: SparsityRecipe, micro_batches: int, layer: int = 0
) -> float:
    """Launches of the host for one layer and micro-batch, both ways, in those of a kernel."""
    captured, experts = graphs_refusal(config) is None, config.model.expert_layers[layer]
    if captured and not experts:
        return GRAPH_LAUNCHES
    here = linears(config, layer)
    if captured:  # the attention alone
        here = [one for one in here if one.name.startswith("mlp.")]
    sparse = _sparse(config, recipe)
    made = [one for one in here if config.fp8.fp8_format or one.name in sparse]
    count = GRAPH_LAUNCHES + LAYER_LAUNCHES / 2 if captured else LAYER_LAUNCHES
    count += len(made) * (SPARSE_LAUNCHES + WEIGHT_LAUNCHES / micro_batches)
    count += 3 * sum(one.times - 1 for one in here)  # the GEMMs of further experts
    if config.parallel.tensor_model_parallel_size > 1:
        # Forward and backward of two pairs of linears: with sp X, z, dz, X again and dX of each,
        # otherwise z and dX.
        count += 2 * (5 if config.parallel.sequence_parallel else 2) * COLLECTIVE_LAUNCHES
    if (cp := config.parallel.context_parallel_size) > 1:
        # An attention and an exchange with each rank, both ways.
        count += 2 * cp * (1 + COLLECTIVE_LAUNCHES)
    return count * 4 / 3 if config.parallel.recompute_granularity == "full" else count


def _sparse(config: ResolvedConfig, recipe: SparsityRecipe) -> set[str]:
    """Names of those that are 2:4 (in any layer)."""
    tp = config.parallel.tensor_model_parallel_size
    return {w.name.split(".", 3)[-1] for w in stage_weights(config, recipe, tp, 0) if w.sparse}


def _operands_bf16(
    recipe: SparsityRecipe, shape: tuple[int, int, int], micro_batches: int, table: GemmTable
) -> float:
    """Seconds of a 16-bit sparse linear's operands, for one micro-batch."""
    tokens, n, k = shape
    seconds = 0.0
    if "grad_weight" in recipe.sparse_gemms:  # dZ read, written packed
        seconds += table.moving(SIZE * tokens * n * 25 / 16, "mvue_pack")
    remake = REMAKE_BYTES["soft_threshold" if recipe.projection == "soft_threshold" else "row"]
    once = n * k * (remake + 25 / 8)  # W~ made, read and packed
    if "grad_input" in recipe.sparse_gemms:
        once += n * k * (4 + 25 / 8)  # transposed, read and packed
    else:
        seconds += table.moving(n * k * remake)
    mask = n * k * MASK_BYTES / recipe.mask_update_interval if recipe.has_mask else 0.0
    return seconds + table.moving(once + mask) / micro_batches


def _quantized_apart(config: ResolvedConfig, name: str) -> tuple[bool, bool]:
    """Whether a linear's input, and the gradient of its output, are written in 16 bits first."""
    delayed = config.fp8.fp8_recipe == "delayed"
    gated = delayed and config.model.swiglu
    if name == FC2:
        return not gated, True
    norm = delayed and name in (QKV, FC1) and not config.parallel.sequence_parallel
    return not norm, not (gated and name == FC1)


def _operands_fp8(
    recipe: SparsityRecipe,
    shape: tuple[int, int, int],
    micro_batches: int,
    table: GemmTable,
    apart: tuple[bool, bool],
) -> float:
    """Seconds of an 8-bit sparse linear's operands, for one micro-batch.

    Args:
        apart: see `_quantized_apart`; what is not leaves the kernel before in 8 bits, and takes no
            more bytes than in 16.
    """
    tokens, n, k = shape
    seconds = table.moving(4 * tokens * k, "cast") if apart[0] else 0.0  # X read, written twice
    if "grad_weight" in recipe.sparse_gemms:  # dZ read, written in 8 bits and packed
        seconds += table.moving(tokens * n * (2 * apart[1] + 1 + 5 / 8), "grad_pack")
    else:
        seconds += table.moving(4 * tokens * n, "cast")
    written = 5 / 4 if "grad_input" in recipe.sparse_gemms else 13 / 8
    once = table.moving(n * k * (2 + recipe.has_mask + written), "weight_pack")
    mask = n * k * MASK_BYTES / recipe.mask_update_interval if recipe.has_mask else 0.0
    return seconds + (once + table.moving(mask)) / micro_batches


def _operands_dense_fp8(
    shape: tuple[int, int, int], micro_batches: int, table: GemmTable, apart: bool
) -> float:
    """Seconds of an 8-bit dense linear's operands, for one micro-batch: each read in 16 bits and
    written twice.

    Args:
        apart: whether the input is written in 16 bits first.
    """
    tokens, n, k = shape
    seconds = table.moving(4 * tokens * (n + k * apart), "cast")
    return seconds + table.moving(4 * n * k, "cast") / micro_batches


def _output(config: ResolvedConfig, vocabulary: int, table: GemmTable) -> float:
    """Seconds of the output layer and the loss for one micro-batch, forward and backward."""
    tokens = tokens_here(config)
    shard, h = vocabulary // config.parallel.tensor_model_parallel_size, config.model.hidden_size
    gemms = (
        table.seconds(tokens, shard, h, False)
        + table.seconds(tokens, h, shard, False)
        + table.seconds(shard, h, tokens, False)
    )
    return gemms + table.moving(LOGITS_BYTES * tokens * shard)
