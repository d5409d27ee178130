"""The table of parameters against built models: names, shapes, marks, on every kind of stage."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from megasparse.config import CompleteModel, load_config, narrowed, resolve
from megasparse.config.shapes import (
    VOCABULARY,
    layer_parameters,
    parameter_count,
    parameters,
    stage_parameters,
)
from tests import dist
from tests.runs import LLAMA, TINY

VOCAB = 128
BASE = [*TINY, "--mock-data"]
GROUPS = ["--num-query-groups", "2"]
TP2 = ["--tensor-model-parallel-size", "2"]
BERT = ["--model-type", "bert", "--data-path", "D"]
PP2 = ["--pipeline-model-parallel-size", "2"]

CASES = {
    "gpt2": [],
    "gpt2, grouped queries, wide heads": [*GROUPS, "--kv-channels", "32"],
    "gpt2, untied": ["--untie-embeddings-and-output-weights"],
    "llama, grouped queries": [*LLAMA, *GROUPS],
    "llama, biases": [*LLAMA, "--no-disable-bias-linear"],
    "llama, tied": [*LLAMA, "--no-untie-embeddings-and-output-weights"],
    "llama, QKV bias, QK norms of heads": [*LLAMA, "--add-qkv-bias", "--qk-layernorm"],
    "gpt2, QK norms of heads": ["--qk-layernorm"],
    "llama, norms behind, QK norms of all": [
        *LLAMA, "--norm-placement", "post", "--qk-layernorm", "--qk-layernorm-scope", "all",
    ],
    "gpt2, norms before and behind": ["--norm-placement", "both"],
    "gpt2, branches side by side": ["--parallel-residual"],
    "experts": [
        *LLAMA, "--num-experts", "4", "--moe-ffn-hidden-size", "32", "--moe-layer-freq", "[0,1]",
        "--moe-shared-expert-intermediate-size", "64", "--moe-shared-expert-gate",
        "--sequence-parallel",
    ],
    "bert, GEGLU": ["--geglu", *BERT],
    "bert, untied, masked tokens alone": [
        *BERT, "--no-bert-binary-head", "--untie-embeddings-and-output-weights",
    ],
    "bert, classes": [
        "--model-type", "bert", "--num-classes", "3", "--train-data", "T", "--tokenizer-model", "M",
    ],
}  # fmt: skip
PIPELINES = {
    "gpt2, tied": [],
    "gpt2, untied": ["--untie-embeddings-and-output-weights"],
    "llama": [*LLAMA, *GROUPS],
    "llama, norms behind": [*LLAMA, "--norm-placement", "post", "--qk-layernorm"],
}  # fmt: skip


def base(flags: list[str]) -> list[str]:
    """Mock data, but for BERT, which has data of its own; nothing is read of them here."""
    return TINY if "bert" in flags else BASE


def _built(rank: int, world: int, cases: dict[str, list[str]]) -> dict[str, dict[str, Any]]:
    """By case and name: global shape, sharded dimension and fused parts, as Megatron marks them."""
    import torch

    from megasparse.megatron.grid import make_grid
    from megasparse.megatron.init import parameter_shard
    from megasparse.megatron.model import build_model
    from megasparse.megatron.pipeline import finish_stage, part_specs, stage_bounds
    from megasparse.sparsity.controller import Clock

    found: dict[str, dict[str, Any]] = {}
    for name, flags in cases.items():
        config = resolve(load_config(flags), world)
        parallel = config.parallel
        stages = parallel.pipeline_model_parallel_size
        grid = make_grid(
            parallel.tensor_model_parallel_size,
            torch.device("cpu"),
            1,
            pipeline_model_parallel_size=stages,
        )
        if stages == 1:
            model = build_model(config, grid, VOCAB)
        else:
            specs, bounds = part_specs(config, grid, VOCAB, Clock(1, 1)), stage_bounds(config)
            mine = specs[bounds[grid.pp_rank] : bounds[grid.pp_rank + 1]]
            model = finish_stage([s.kind(**s.options) for s in mine], config, grid)
        found[name] = {}
        for key, parameter in model.named_parameters():
            shard = parameter_shard(parameter, grid.tp_rank, grid.tp_size)
            local = tuple(parameter.shape)
            found[name][key] = (shard.global_shape, local, shard.dim, shard.parts)
    return found


@pytest.fixture(scope="module")
def whole() -> dict[str, dict[str, Any]]:
    return dist.run(_built, 1, {name: [*base(flags), *flags] for name, flags in CASES.items()})[0]


@pytest.fixture(scope="module")
def halves() -> list[dict[str, dict[str, Any]]]:
    return dist.run(
        _built, 2, {name: [*base(flags), *flags, *TP2] for name, flags in CASES.items()}
    )


@pytest.mark.parametrize("case", CASES)
def test_the_whole_model(whole, case):
    model = resolve(load_config([*base(CASES[case]), *CASES[case]]), 1).model
    table = parameters(model, VOCAB)
    built = {name: shape for name, (shape, *_) in whole[case].items()}
    assert {one.name: one.shape for one in table} == built
    assert [one.name for one in table] == list(built)
    assert parameter_count(model, VOCAB) == sum(one.numel for one in table)


@pytest.mark.parametrize("case", CASES)
def test_what_tensor_parallelism_cuts(halves, case):
    model = resolve(load_config([*base(CASES[case]), *CASES[case], *TP2]), 2).model
    expected = {
        one.name: (one.shape, one.local_shape(2), one.shard_dim, one.parts)
        for one in parameters(model, VOCAB)
    }
    for rank in halves:
        assert rank[case] == expected


@pytest.fixture(scope="module")
def stages() -> list[dict[str, dict[str, Any]]]:
    return dist.run(_built, 2, {name: [*BASE, *flags, *PP2] for name, flags in PIPELINES.items()})


@pytest.mark.parametrize("case", PIPELINES)
def test_what_a_pipeline_stage_has(stages, case):
    config = resolve(load_config([*BASE, *PIPELINES[case], *PP2]), 2)
    for stage, found in enumerate(stages):
        table = stage_parameters(config, VOCAB, stage)
        built = {name: shape for name, (shape, *_) in found[case].items()}
        assert {one.name: one.shape for one in table} == built


def test_names_within_a_layer_and_of_the_vocabulary():
    model = resolve(load_config([*BASE, "--untie-embeddings-and-output-weights"]), 1).model
    table = parameters(model, VOCAB)
    second = [one for one in table if one.layer == 1]
    prefix = "decoder.layers.1."
    assert [one.name.removeprefix(prefix) for one in second] == [
        one.name for one in layer_parameters(model)
    ]
    assert tuple(one.name for one in table if one.shape[0] == VOCAB) == VOCABULARY


def test_a_model_without_padding_has_its_own_vocabulary():
    model = resolve(load_config([*BASE, "--vocab-size", "99"]), 1).model
    complete = narrowed(CompleteModel, model, "here")
    assert parameters(complete, complete.vocab_size)[0].shape == (99, model.hidden_size)


def test_shapes_need_no_torch():
    code = "import sys, megasparse.config.shapes; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_a_recipe_can_make_sparse():
    model = resolve(load_config([*BASE, *LLAMA]), 1).model
    linears = [one.module for one in parameters(model, VOCAB) if one.is_linear]
    assert len(linears) == 4 * model.num_layers
    assert all(name.startswith("decoder.layers.") for name in linears)
