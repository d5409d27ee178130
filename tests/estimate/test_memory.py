"""Estimated bytes against built models and engines: parameters, state and activations, exactly."""

from __future__ import annotations

from typing import Any

import pytest

from tests import dist
from tests.runs import LLAMA, TINY

BASE = [*TINY, "--mock-data", "--train-iters", "10"]
TP2 = ["--tensor-model-parallel-size", "2"]
CP2 = ["--context-parallel-size", "2"]
PP2 = ["--pipeline-model-parallel-size", "2"]
FP8 = [
    "--bf16", "--fp8-format", "e4m3", "--hidden-size", "128", "--ffn-hidden-size", "256",
    "--num-attention-heads", "2", "--seq-length", "64", "--transformer-impl", "local",
    "--sparse-layers", "*.mlp.*", "*.self_attention.linear_*",
]  # fmt: skip
DENSE_FP8 = [
    "--bf16", "--fp8-format", "hybrid", "--sparsity-recipe", "dense", "--masked-decay", "none",
    "--dense-tail-fraction", "none", "--hidden-size", "64", "--ffn-hidden-size", "192",
]  # fmt: skip
WIDE = ["--sparse-layers", "*.mlp.linear_fc1", "*.self_attention.linear_*"]


def _measure(rank: int, world: int, flags: list[str]) -> dict[str, Any]:
    """Estimate and truth of one rank: names with shapes, and bytes after a step."""
    import torch

    from megasparse.config import load_config, padded_vocab_size, resolve
    from megasparse.estimate.memory import footprint, stage_weights
    from megasparse.megatron.data.batches import batches, build_data
    from megasparse.megatron.grid import make_grid
    from megasparse.sparsity.run_recipe import recipe_of
    from megasparse.train.build import build_engine
    from megasparse.train.engine.deepspeed import start_process

    config = resolve(load_config(flags), world)
    parallel, recipe = config.parallel, recipe_of(config)
    device = start_process(5.0)
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    cp = parallel.context_parallel_size
    grid = make_grid(tp, device, 1, pipeline_model_parallel_size=pp, context_parallel_size=cp)
    data = build_data(config, grid)
    vocabulary = padded_vocab_size(data.vocab_size, config)
    engine = build_engine(config, grid, recipe, vocabulary)
    engine.train_step(batches(data.streams["train"], config, grid, 0))

    def nbytes(values: Any) -> int:
        tensors = [v for v in values if torch.is_tensor(v) and v.dim()]
        return sum(v.numel() * v.element_size() for v in tensors)

    states = [state for _, state in _sparse_weights(engine.model)]
    flat = [t for group in engine.optimizer.param_groups for t in group["params"]]
    moments = [v for state in engine.optimizer.state.values() for v in state.values()]
    # Each tensor once: an implementation may know its operand by two names.
    made = [state._gemms[True] for state in states]
    made += [dense._gemms for dense, _ in engine.controller.dense]
    operands = [{id(v): v for v in vars(one).values()}.values() for one in made]
    estimated = footprint(config, recipe, vocabulary, world, grid.pp_rank, gpu=False)
    weights = stage_weights(config, recipe, vocabulary, grid.pp_rank)
    sparse = sum(weight.numel() for _, weight in engine.controller.weights)
    return {
        "weights": {weight.name: weight.shape for weight in weights},
        "built": {name: tuple(p.shape) for name, p in engine.model.named_parameters()},
        "sparse": [estimated.sparse_parameters, sparse],
        "estimated": estimated.state,
        "found": {
            "parameters": nbytes(engine.model.parameters()),
            "optimizer": nbytes(moments) + (nbytes(flat) if parallel.zero_stage else 0),
            "gradients": nbytes(engine.layout.gradients.flat if engine.layout.gradients else ()),
            "masks": nbytes(state.mask for state in states),
            "operands": sum(map(nbytes, operands)),
        },
    }


def _sparse_weights(model: Any) -> list[tuple[str, Any]]:
    from megasparse.sparsity.state import SparseWeight

    return [(n, m) for n, m in model.named_modules() if isinstance(m, SparseWeight)]


@pytest.mark.parametrize(
    "flags",
    [
        [*TP2, *LLAMA, "--bf16"],
        [*PP2, *WIDE],  # tied embeddings: a copy on the last stage
        ["--zero-stage", "2", "--bf16", "--sparsity-recipe", "s_ste_3", "--masked-decay", "none"],
        [*TP2, *DENSE_FP8],
        [*CP2, "--zero-stage", "1", *LLAMA],
    ],
    ids=["tp 2 bf16", "pp 2 tied", "dp 2 zero 2", "tp 2 dense fp8", "cp 2 zero 1"],
)
def test_every_parameter_and_every_byte_of_the_state(flags):
    for rank, found in enumerate(dist.run(_measure, 2, [*BASE, *flags])):
        assert found["weights"] == found["built"], rank
        assert found["sparse"][0] == found["sparse"][1], rank
        assert (found["sparse"][0] == 0) == ("dense" in flags)
        assert found["estimated"] == found["found"], rank


def _saved(rank: int, world: int, flags: list[str]) -> list[int]:
    """Bytes that autograd keeps of a layer: as estimated, and as counted by its hooks."""
    import torch

    from megasparse.config import load_config, resolve
    from megasparse.estimate.memory import layer_activations
    from megasparse.fp8.delayed import DelayedScaling
    from megasparse.megatron.grid import make_grid
    from megasparse.megatron.model import build_model
    from megasparse.megatron.sparsify import sparsify
    from megasparse.sparsity.clock import Clock
    from megasparse.sparsity.run_recipe import recipe_of
    from megasparse.train.engine.deepspeed import start_process

    config = resolve(load_config(flags), world)
    parallel, model = config.parallel, config.model
    device = start_process(5.0)
    tp = parallel.tensor_model_parallel_size
    gpt = build_model(config, make_grid(tp, device, 1), 128)
    if config.fp8.fp8_format:
        scales, recipe = DelayedScaling(device), recipe_of(config)
        sparsify(gpt, recipe, Clock(1, 10), fp8=scales)
    own = {p.untyped_storage().data_ptr() for p in gpt.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    length = model.seq_length // (tp if parallel.sequence_parallel else 1)
    dtype = torch.bfloat16 if config.train.bf16 else torch.float32
    shape = (length, config.train.micro_batch_size, model.hidden_size)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    rotary = gpt.rotary_pos_emb(model.seq_length) if "rope" in flags else None
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        gpt.decoder.layers[0](hidden_states=x, attention_mask=None, rotary_pos_emb=rotary)
    counted = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    return [layer_activations(config, gpu=False), counted]


@pytest.mark.parametrize(
    "flags",
    [
        [],
        [*LLAMA, "--bf16"],
        [*LLAMA, "--bf16", *TP2, "--sequence-parallel"],
        [*LLAMA, *FP8],
        [*LLAMA, *FP8, *TP2, "--sequence-parallel", "--hidden-size", "256"],
    ],
    ids=["gpt", "llama bf16", "llama tp 2 sp", "llama fp8", "llama fp8 tp 2 sp"],
)
def test_what_autograd_keeps_of_a_layer(flags):
    for estimated, counted in dist.run(_saved, 2, [*BASE, *flags]):
        assert estimated == counted


@pytest.mark.parametrize("name", ["fst", "s_ste", "s_ste_3"])
def test_operands_in_8_bits(name):
    import torch

    from megasparse.config import load_config, resolve
    from megasparse.estimate.memory import footprint
    from megasparse.kernels import transposable24_mask, weight_pack24
    from megasparse.kernels.packed24 import E4M3, Packed24
    from megasparse.sparsity.run_recipe import recipe_of

    config = resolve(
        load_config([*BASE, *LLAMA, *FP8, "--masked-decay", "none", "--sparsity-recipe", name]), 1
    )
    recipe = recipe_of(config)
    estimated = footprint(config, recipe, 128, 1)
    w = torch.randn(128, 256).bfloat16()
    made = weight_pack24(
        w,
        transposable24_mask(w),
        dtype=E4M3,
        scale=torch.tensor(1.0),
        transposed=recipe.packed_transpose or "dense",
    )
    parts = [[m.values, m.metadata] if isinstance(m, Packed24) else [m] for m in made]
    nbytes = sum(t.nbytes for part in parts for t in part)
    assert estimated.state["operands"] * w.numel() == nbytes * estimated.sparse_parameters


@pytest.mark.parametrize(
    ("stage", "precision"),
    [(0, []), (1, []), (2, []), (3, []), (1, ["--bf16"]), (2, ["--bf16"]), (3, ["--bf16"])],
)
def test_gradients_of_zero_2_are_shares(stage, precision):
    """Ranks hold them whole and all the time, or from ZeRO 2 on a share each, within a step."""
    from megasparse.config import load_config, resolve
    from megasparse.estimate.memory import footprint
    from megasparse.sparsity.run_recipe import recipe_of

    world = 8
    flags = ["--zero-stage", str(stage), "--global-batch-size", str(2 * world)]
    config = resolve(load_config([*BASE, *flags, *precision]), world)
    found = footprint(config, recipe_of(config), 128, world)
    whole = 4 * found.parameters
    padding = 3 * 4 * 2 * world  # three groups, each to two entries a rank
    if stage < 2:
        assert whole <= found.state["gradients"] <= whole + padding
    else:
        assert found.state["gradients"] == 0
        assert whole <= world * found.transient["gradient copies"] <= whole + padding
