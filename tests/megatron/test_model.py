"""The model: what is sparse, initial weights, and the count of parameters by formula."""

from __future__ import annotations

import pytest
import torch

from tests import dist
from tests.runs import LLAMA, TINY

DATA = ["--mock-data"]


def _build(rank, world, flags):
    from megasparse.config import load_config, padded_vocab_size, resolve
    from megasparse.config.shapes import parameter_count
    from megasparse.megatron.grid import make_grid
    from megasparse.megatron.init import parameter_shard
    from megasparse.megatron.model import build_model
    from megasparse.megatron.sparsify import sparsify
    from megasparse.sparsity.clock import Clock
    from megasparse.sparsity.run_recipe import recipe_of

    config = resolve(load_config(flags), world)
    grid = make_grid(config.parallel.tensor_model_parallel_size, torch.device("cpu"), 1)
    vocab = padded_vocab_size(128, config)
    model = build_model(config, grid, vocab)
    controller = sparsify(model, recipe_of(config), Clock(1, 10), grid.sum_over_tp)
    parameters = {
        name: (parameter_shard(p, grid.tp_rank, grid.tp_size), p.detach().clone())
        for name, p in model.named_parameters()
    }
    names = [state.name for state, _ in controller.weights]
    return parameters, names, parameter_count(config.model, vocab)


@pytest.mark.parametrize("style", [[], LLAMA], ids=["gpt", "llama"])
def test_initial_weights_do_not_depend_on_tensor_parallelism(style):
    flags = [*TINY, *style, *DATA]
    ((whole, names, count),) = dist.run(_build, 1, flags)
    ranks = dist.run(_build, 2, [*flags, "--tensor-model-parallel-size", "2"])
    assert sum(p.numel() for _, p in whole.values()) == count
    assert names == [
        f"decoder.layers.{i}.mlp.linear_fc{j}.weight" for i in range(2) for j in (1, 2)
    ]
    for name, (_, expected) in whole.items():
        rebuilt = torch.full_like(expected, float("nan"))
        for parameters, *_ in ranks:
            shard, part = parameters[name]
            shard.write_into(rebuilt, part)
        assert torch.equal(rebuilt, expected), name


def test_pattern_adds_attention_but_never_embeddings_or_output():
    patterns = ["--sparse-layers", "*.mlp.linear_*", "*.self_attention.linear_*"]
    ((_, names, _),) = dist.run(_build, 1, [*TINY, *LLAMA, *DATA, *patterns])
    assert len(names) == 8 and not [n for n in names if "embedding" in n or "output_layer" in n]


def test_residual_writers_start_smaller():
    ((parameters, _, _),) = dist.run(_build, 1, [*TINY, *DATA])
    fc1 = parameters["decoder.layers.0.mlp.linear_fc1.weight"][1]
    fc2 = parameters["decoder.layers.0.mlp.linear_fc2.weight"][1]
    assert fc1.std() == pytest.approx(0.02, rel=0.05)
    assert fc2.std() == pytest.approx(0.01, rel=0.05)
    assert (parameters["decoder.layers.0.input_layernorm.weight"][1] == 1).all()
    assert (parameters["decoder.layers.0.mlp.linear_fc1.bias"][1] == 0).all()


def _attention(rank, world):
    """SdpaAttention against softmax attention written out, float64."""
    from types import SimpleNamespace

    from megasparse.megatron.blocks.torch_modules import SdpaAttention

    config = SimpleNamespace(
        attention_dropout=0.0, sequence_parallel=False, window_size=None, window_attn_skip_freq=None
    )
    attention = SdpaAttention(config, 1, None, "self")
    s, b, heads, groups, d = 7, 2, 4, 2, 8
    q = torch.randn(s, b, heads, d).double()
    k, v = (torch.randn(s, b, groups, d).double() for _ in range(2))
    k_all, v_all = (t.repeat_interleave(heads // groups, dim=2) for t in (k, v))
    scores = torch.einsum("ibhd,jbhd->bhij", q, k_all) / d**0.5
    forbidden = torch.ones(s, s).triu(1).bool()
    weights = scores.masked_fill(forbidden, float("-inf")).softmax(-1)
    expected = torch.einsum("bhij,jbhd->ibhd", weights, v_all).flatten(2)
    mask = forbidden[None, None].expand(b, 1, s, s)
    return [float((attention(q, k, v, m) - expected).abs().max()) for m in (None, mask)]


def test_attention_is_causal_with_grouped_queries():
    (errors,) = dist.run(_attention, 1)
    assert max(errors) < 1e-12


@pytest.mark.parametrize(
    ("flags", "world", "reason"),
    [
        ([], 1, None),
        (["--no-bf16"], 1, "float32"),
        (["--pipeline-model-parallel-size", "2"], 2, None),
        (["--reset-attention-mask"], 1, None),
        (["--reset-attention-mask", "--pipeline-model-parallel-size", "2"], 2, "a pipeline"),
        (["--reset-attention-mask", "--deterministic-mode"], 1, "deterministic_mode"),
        (["--deterministic-mode"], 1, None),
        (
            ["--reset-attention-mask", "--teacher-load", "T", "--kd-loss-weight", "1"],
            1,
            "a teacher",
        ),
    ],
)
def test_where_transformer_engine_computes_attention(monkeypatch, flags, world, reason):
    """It packs documents, unless something needs their masks."""
    from megasparse.config import load_config, resolve
    from megasparse.megatron import model

    monkeypatch.setattr(model, "transformer_engine_is_there", lambda: True)
    config = resolve(load_config([*TINY, *DATA, "--bf16", *flags]), world)
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    found = model._transformer_engine_refusal(config, gpu)
    assert found is None if reason is None else reason in found
    packs = "--reset-attention-mask" in flags
    assert model.packs_documents(config, gpu) == (packs and reason is None)
    assert not model.packs_documents(config, cpu)
    assert "the run is on cpu" in model._transformer_engine_refusal(config, cpu)
    monkeypatch.setattr(model, "transformer_engine_is_there", lambda: False)
    assert "not installed" in model._transformer_engine_refusal(config, gpu)
