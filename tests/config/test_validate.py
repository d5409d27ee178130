"""What ties fields together: defaults that are filled in, and refusals with both numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from megasparse.config import (
    gradient_accumulation_steps,
    load_config,
    padded_vocab_size,
    resolve,
)
from megasparse.errors import ConfigError

DATA = ["--mock-data", "--vocab-size", "128"]
CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))

# Parameters of the whole model, as the models are named.
NOMINAL = {
    "gpt2_124m": 124e6,
    "gpt2_350m": 355e6,
    "gpt2_774m": 774e6,
    "gpt2_1.5b": 1558e6,
    "llama_1b": 1.1e9,
    "llama_8b": 8.03e9,
    "mistral_7b": 7.24e9,
    "qwen2_5_1.5b": 1.54e9,
    "qwen3_8b": 8.19e9,
    "olmo2_7b": 7.30e9,
    "smollm3_3b": 3.08e9,
    "phi3_mini": 3.82e9,
    "pythia_1.4b": 1.41e9,
    "opt_1.3b": 1.32e9,
}


def test_defaults_are_filled_in():
    config = resolve(load_config([*DATA, "--hidden-size", "96", "--num-attention-heads", "3"]), 2)
    assert config.model.ffn_hidden_size == 384 and config.model.kv_channels == 32
    assert config.train.global_batch_size == 2 and config.parallel.zero_stage == 0
    assert gradient_accumulation_steps(config, 2) == 1
    assert resolve(load_config([*DATA, "--bf16"]), 1).parallel.zero_stage == 1
    assert padded_vocab_size(50257, config) == 50304


@pytest.mark.parametrize(
    ("flags", "world", "message"),
    [
        (["--hidden-size", "100", "--num-attention-heads", "3"], 1, "num_attention_heads 3"),
        (["--tensor-model-parallel-size", "2"], 3, "world size 3 is not divisible by"),
        (["--moe-grouped-gemm"], 1, "moe_grouped_gemm True needs num_experts"),
        (["--expert-model-parallel-size", "2"], 2, "2 needs num_experts"),
        (["--num-experts", "4"], 1, "num_experts needs disable_bias_linear"),
        (["--num-experts", "4", "--moe-router-topk", "5"], 1, "moe_router_topk 5 of num_experts 4"),
        (["--num-experts", "4", "--moe-router-topk", "1"], 1, "1 needs moe_router_pre_softmax"),
        (["--num-experts", "4", "--moe-layer-freq", "[1]"], 1, "moe_layer_freq has 1 items"),
        (
            ["--num-experts", "3", "--expert-model-parallel-size", "2"],
            2,
            "num_experts 3 is not divisible by expert_model_parallel_size 2",
        ),
        (
            ["--num-experts", "4", "--expert-model-parallel-size", "4"],
            2,
            "the data parallel size x context_parallel_size 2 is not divisible by",
        ),
        (
            ["--num-experts", "4", "--context-parallel-size", "2", "--seq-length", "36"],
            2,
            "chunks of 9 tokens cut segments of 36",
        ),
        (
            ["--num-experts", "4", "--tensor-model-parallel-size", "2"],
            2,
            "with tensor_model_parallel_size 2 needs sequence_parallel",
        ),
        (
            ["--num-experts", "4", "--expert-tensor-parallel-size", "2"],
            1,
            "expert_tensor_parallel_size 2 is not supported",
        ),
        (["--num-experts", "4", "--zero-stage", "2"], 1, "zero_stage 2 with num_experts"),
        (["--num-query-groups", "3"], 1, "not divisible by num_query_groups 3"),
        (["--num-query-groups", "1", "--tensor-model-parallel-size", "2"], 2, "num_query_groups 1"),
        (
            ["--ffn-hidden-size", "12", "--tensor-model-parallel-size", "2"],
            2,
            "ffn_hidden_size 12 over tensor_model_parallel_size 2 leaves a shard that cuts",
        ),
        (["--hidden-size", "6", "--num-attention-heads", "1"], 1, "cuts a 4x4 block"),
        (["--group-query-attention"], 1, "needs num_query_groups"),
        (["--max-position-embeddings", "8"], 1, "longer than max_position_embeddings 8"),
        (["--global-batch-size", "3", "--micro-batch-size", "2"], 1, "global_batch_size 3"),
        (["--lr-warmup-iters", "200"], 1, "lr_warmup_iters 200 is more than"),
        (["--lr-warmup-iters", "2", "--lr-warmup-fraction", "0.1"], 1, "both set"),
        (["--min-lr", "1"], 1, "min_lr 1.0 is above lr"),
        (["--swiglu", "--squared-relu"], 1, "swiglu and squared_relu are both set"),
        (["--lr-decay-style", "WSD"], 1, "WSD needs lr_wsd_decay_iters"),
        (["--lr-wsd-decay-iters", "5"], 1, "with lr_decay_style cosine, expected WSD"),
        (
            ["--lr-decay-style", "WSD", "--lr-wsd-decay-iters", "95", "--lr-warmup-iters", "10"],
            1,
            "lr_wsd_decay_iters 95, expected at most the 90 steps",
        ),
        (["--lr-linear-to-zero-iters", "101"], 1, "expected at most the 100 steps"),
        (
            [
                "--bf16",
                "--sparsity-recipe",
                "s_ste",
                "--fp8-format",
                "e4m3",
                "--fp8-recipe",
                "tensorwise",
                "--fp8-margin",
                "2",
            ],
            1,
            "fp8_margin 2 with fp8_recipe tensorwise, expected 0",
        ),
        (
            ["--sequence-parallel", "--tensor-model-parallel-size", "2", "--seq-length", "33"],
            2,
            "seq_length 33 is not divisible",
        ),
        (["--dense-warmup-fraction", "0.6", "--dense-tail-fraction", "0.6"], 1, "expected at most"),
        (["--data-path", "a"], 1, "exactly one of"),
    ],
)
def test_refusals(flags, world, message):
    with pytest.raises(ConfigError, match=message):
        resolve(load_config([*DATA, *flags]), world)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_committed_configs_resolve(path):
    from megasparse.config.shapes import parameter_count
    from megasparse.sparsity.run_recipe import recipe_of

    config = load_config(["--config", str(path)])
    world = 8 * config.parallel.expert_model_parallel_size
    if path.stem == "quickstart":
        world = 2
    if path.stem.startswith("compare"):
        world = 1
    config = resolve(config, world)
    recipe = recipe_of(config)
    for name, nominal in NOMINAL.items():
        if path.stem.startswith(name):
            assert path.stem == name or path.stem == f"{name}_{recipe.name}"
            vocab = padded_vocab_size(config.model.vocab_size, config)
            assert parameter_count(config.model, vocab) == pytest.approx(nominal, rel=0.03)


@pytest.mark.parametrize(("hidden", "ffn"), [(96, 256), (768, 2048), (4096, 10880), (16, 64)])
def test_a_gated_ffn_has_the_parameters_of_one_without(hidden, ffn):
    """8/3 of the hidden size, down to a multiple of 64: three matrices in place of two."""
    flags = [*DATA, "--hidden-size", str(hidden), "--num-attention-heads", "1", "--swiglu"]
    model = resolve(load_config(flags), 1).model
    assert model.ffn_hidden_size == ffn
    assert hidden == 16 or 0.9 < 3 * ffn / (2 * 4 * hidden) <= 1


@pytest.mark.parametrize("phase", ["warmup", "tail"])
def test_slorb_has_no_dense_phase(phase):
    flags = [*DATA, "--sparsity-recipe", "ast", "--slorb-k", "8"]
    assert resolve(load_config(flags), 1).sparsity.slorb_k == 8
    with pytest.raises(ConfigError, match="slorb_k needs a run without dense_warmup_fraction"):
        resolve(load_config([*flags, f"--dense-{phase}-fraction", "0.25"]), 1)
