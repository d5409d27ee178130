"""How long a training step takes on GPUs, from measured rates of its parts (BF16).

The parts of a micro-batch on one rank: the three GEMMs of every linear, by the nearest measured
shape; attention; what runs at memory bandwidth (norms, activations, softmax, MVUE and packing); the
collectives of tensor parallelism. Then the pipeline's bubble, the reduction of gradients, and the
optimizer. `overhead` of the table is what one real run took over the sum of its parts.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megasparse.config import (
    RunConfig,
    data_parallel_size,
    gradient_accumulation_steps,
    pipeline_split,
)
from megasparse.sparsity.recipe import SparsityRecipe
from megasparse.train.footprint import layer_activations, layer_weights, stage_weights

TABLE = Path(__file__).parent / "results" / "gemm-h200.json"
# Times that a kept activation passes through memory besides the GEMMs: written and read forward,
# read backward, and its gradient written and read.
PASSES = 5
OPTIMIZER_BYTES = 44  # a parameter: master, two moments read and written, gradient casts, result
SIZE = 2  # bytes of bf16


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step, by part; their sum times `overhead` is the prediction."""

    parts: dict[str, float]
    overhead: float

    @property
    def seconds(self) -> float:
        return sum(self.parts.values()) * self.overhead


class GemmTable:
    """Measured rates of one kind of GPU.

    Args:
        path: a file like results/gemm-h200.json, which says what its fields are.
    """

    def __init__(self, path: Path = TABLE) -> None:
        self.data: dict[str, Any] = json.loads(path.read_text())

    def seconds(self, tokens: int, outputs: int, inputs: int, sparse: bool) -> float:
        """Of one GEMM, at the rate of the nearest measured shape (by ratios of the sizes)."""
        wanted = [math.log(size) for size in (tokens, outputs, inputs)]

        def distance(row: dict[str, float]) -> float:
            return sum(abs(math.log(row[n]) - w) for n, w in zip("TNK", wanted, strict=True))

        row = min(self.data["rows"], key=distance)
        rate = max(row["bf16_24"], row["bf16"]) if sparse else row["bf16"]
        return 2.0 * tokens * outputs * inputs / (rate * 1e12)

    def moving(self, nbytes: float, what: str = "copy") -> float:
        """Seconds to move bytes at a measured or assumed bandwidth."""
        return nbytes / (self.data[f"{what}_gbps"] * 1e9)


def step_time(
    config: RunConfig,
    recipe: SparsityRecipe,
    vocabulary: int,
    world: int,
    table: GemmTable,
    gpus_per_node: int = 8,
) -> StepTime:
    """The predicted time of a step of the sparse phase.

    Args:
        config: resolved for `world` ranks.
        vocabulary: padded.
    """
    parallel = config.parallel
    tp, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    dp = data_parallel_size(config, world)
    micro_batches = gradient_accumulation_steps(config, world)
    split = pipeline_split(config)
    layer = _layer(config, recipe, table, gpus_per_node)
    ends = _output(config, vocabulary, table)
    # The slowest stage sets the pace: the last one has the output layer.
    busiest = {name: seconds * max(split) for name, seconds in layer.items()}
    last = {name: seconds * split[-1] for name, seconds in layer.items()}
    last["logits"] = ends
    pace = max(busiest, last, key=lambda parts: sum(parts.values()))
    parts = {name: seconds * micro_batches for name, seconds in pace.items()}
    parts["pipeline bubble"] = sum(pace.values()) * (stages - 1)
    weights = sum(w.numel for w in stage_weights(config, recipe, vocabulary, 0))
    link = "nvlink" if tp * dp <= gpus_per_node else "network"
    parts["gradient reduction"] = table.moving(2 * SIZE * weights * (dp - 1) / dp, link)
    parts["gradients"] = table.moving(3 * SIZE * weights) * micro_batches
    parts["optimizer"] = table.moving(OPTIMIZER_BYTES * weights / dp)
    return StepTime(parts, table.data["overhead"])


def _layer(
    config: RunConfig, recipe: SparsityRecipe, table: GemmTable, gpus_per_node: int
) -> dict[str, float]:
    """Seconds of one layer for one micro-batch, forward and backward."""
    model, parallel = config.model, config.parallel
    tp = parallel.tensor_model_parallel_size
    tokens = config.train.micro_batch_size * model.seq_length
    sparse = {w.name.split(".", 3)[-1] for w in stage_weights(config, recipe, tp, 0) if w.sparse}
    parts = {"GEMMs": 0.0, "operands": 0.0}
    forward = 0.0
    for name, shape in layer_weights(model, tp):
        if len(shape) != 2:
            continue
        (n, k), chosen = shape, recipe.sparse_gemms if name in sparse else ()
        output = table.seconds(tokens, n, k, "output" in chosen)
        forward += output
        parts["GEMMs"] += output
        parts["GEMMs"] += table.seconds(tokens, k, n, "grad_input" in chosen)
        parts["GEMMs"] += table.seconds(k, n, tokens, "grad_weight" in chosen)
        if "grad_weight" in chosen:  # dZ read, written packed
            parts["operands"] += table.moving(SIZE * tokens * n * 25 / 16, "mvue")
        if name in sparse:  # W~ once a step; the pack and the projection read the weight
            packs = 2 if recipe.transposable else 1
            moved = SIZE * n * k * packs * 41 / 16
            parts["operands"] += table.moving(moved, "pack") / _accumulation(config)
    assert model.kv_channels
    heads = model.num_attention_heads * model.kv_channels // tp
    attention = 2.0 * tokens * model.seq_length * heads / (table.data["attention_tflops"] * 1e12)
    parts["attention"] = 3.5 * attention
    moved = PASSES * layer_activations(config)
    parts["memory"] = table.moving(moved)
    if parallel.recompute_granularity == "full":
        parts["recomputation"] = forward + attention + table.moving(moved) * 2 / PASSES
    elif parallel.recompute_granularity == "selective":
        parts["recomputation"] = attention
    if tp > 1:  # gather or sum before and after two pairs of linears, forward and backward
        link = "nvlink" if tp <= gpus_per_node else "network"
        times = 6 if parallel.sequence_parallel else 8
        moved = times * SIZE * tokens * model.hidden_size * (tp - 1) / tp
        parts["tensor parallel"] = table.moving(moved, link)
    return parts


def _accumulation(config: RunConfig) -> int:
    """Micro-batches of a data-parallel rank if there were one: an upper bound, for small terms."""
    assert config.train.global_batch_size
    return max(config.train.global_batch_size // config.train.micro_batch_size, 1)


def _output(config: RunConfig, vocabulary: int, table: GemmTable) -> float:
    """Seconds of the output layer and the softmax for one micro-batch, forward and backward."""
    tokens = config.train.micro_batch_size * config.model.seq_length
    shard, h = vocabulary // config.parallel.tensor_model_parallel_size, config.model.hidden_size
    gemms = (
        table.seconds(tokens, shard, h, False)
        + table.seconds(tokens, h, shard, False)
        + table.seconds(shard, h, tokens, False)
    )
    return gemms + table.moving(30.0 * tokens * shard)
