"""The formulas of `train.flops` against torch's counter on real models, forward and backward."""

from __future__ import annotations

import pytest
import torch

from megasparse.config import load_config, resolve
from megasparse.estimate import flops
from megasparse.sparsity.recipe import PRESETS, make_recipe
from tests import dist
from tests.runs import LLAMA, TINY

GPT2 = ["--num-layers", "3"]
FULL = ["--recompute-granularity", "full"]
BLOCK = [*FULL, "--recompute-method", "block", "--recompute-num-layers", "1", "--num-layers", "3"]
CASES = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "long": [*LLAMA, "--seq-length", "256", "--num-query-groups", "1"],
    "heads": [*LLAMA, "--kv-channels", "32"],
    "full": [*LLAMA, *FULL],
    "block": BLOCK,
    "selective": [*LLAMA, "--recompute-granularity", "selective"],
}
BATCH = 2


def _config(flags):
    return resolve(load_config([*TINY, "--mock-data", *flags]), 1)


def count(rank, world, cases):
    """Operations a token that torch's counter sees, by case: (forward and backward, forward)."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from megasparse.megatron.grid import make_grid
    from megasparse.megatron.model import build_model

    grid = make_grid(1, torch.device("cpu"), 0)
    results = {}
    for name, flags in cases.items():
        config = _config(flags)
        model = build_model(config, grid, 128)
        shape = (BATCH, config.model.seq_length)
        tokens, positions = torch.randint(128, shape), torch.arange(shape[1]).expand(shape)
        # Plain products, which the counter knows; they compute all S keys.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(tokens, positions, None, labels=tokens).sum().backward()
        results[name] = counter.get_total_flops() / tokens.numel()
    return results


@pytest.fixture(scope="module")
def counted():
    return dist.run(count, 1, CASES)[0]


@pytest.mark.parametrize("name", CASES)
def test_formula_and_counter_agree_within_two_percent(counted, name):
    config = _config(CASES[name])
    formula = flops.token_flops(config.model, config.parallel, 128, PRESETS["dense"], causal=False)
    assert formula.by_recipe == pytest.approx(counted[name], rel=0.02)
    assert (formula.recomputed > 0) == ("--recompute-granularity" in CASES[name])


def test_a_24_gemm_does_half():
    config = _config(["--ffn-hidden-size", "256"])
    h, f, layers = 64, 256, 2
    ffn = layers * 2 * 2 * h * f  # forward of both linears
    for recipe, gemms in (
        ("ste", 1),
        ("s_ste", 2),
        ("s_ste_3", 3),
        ("fst", 3),
        ("ast", 1),
        ("dense", 0),
    ):
        here = flops.token_flops(config.model, config.parallel, 128, make_recipe(recipe))
        assert here.saved == gemms * ffn / 2
        assert here.dense == flops.of_run(config, 128, PRESETS["dense"]).by_recipe
    late = flops.token_flops(
        config.model, config.parallel, 128, make_recipe("fst"), sparse_now=False
    )
    assert late.by_recipe == late.dense
    one = make_recipe("fst", sparse_layers=("decoder.layers.1.mlp.linear_fc2",))
    only = flops.token_flops(config.model, config.parallel, 128, one)
    assert only.saved == 3 * 2 * h * f / 2


def test_recomputed_sparse_layers_save_once_more():
    config = _config(["--ffn-hidden-size", "256", *FULL])
    flags = (config.model, config.parallel, 128, make_recipe("fst"))
    here = flops.token_flops(*flags)
    assert here.saved == 4 * (2 * 2 * 2 * 64 * 256) / 2


@pytest.mark.parametrize(
    ("window", "skip"), [(1, None), (5, None), (5, "2"), (32, "3"), (99, None)]
)
def test_windows_count_the_keys_in_them(window, skip):
    flags = ["--num-layers", "4", "--seq-length", "32", "--window-size", f"{window - 1},0"]
    model = _config([*flags, *(["--window-attn-skip-freq", skip] if skip else [])]).model
    keys = [
        min(place + 1, window) if windowed else place + 1
        for windowed in model.windowed_layers
        for place in range(32)
    ]
    assert flops.seen_keys(model) == pytest.approx(sum(keys) / len(keys))
    wanted = 4.0 * flops.seen_keys(model) * model.num_attention_heads * model.kv_channels
    assert flops.attention_flops(model) == wanted


def test_causal_attention_counts_half_of_the_keys():
    model = _config([]).model
    causal, whole = flops.attention_flops(model), flops.attention_flops(model, causal=False)
    assert causal / whole == (model.seq_length + 1) / (2 * model.seq_length)


@pytest.mark.parametrize(
    ("gpu", "precision", "peak"),
    [
        ("NVIDIA H200", "bf16", 989.5),
        ("NVIDIA H100 80GB HBM3", "fp8", 1979.0),
        ("NVIDIA H100 PCIe", "bf16", 756.0),
        ("NVIDIA H100 NVL", "bf16", 835.5),
        ("NVIDIA A100-SXM4-80GB", "fp8", None),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312.0),
        ("NVIDIA GH200 480GB", "bf16", 989.5),
        ("Some GPU", "bf16", None),
    ],
)
def test_peaks(gpu, precision, peak):
    assert flops.peak_tflops(gpu, precision) == peak
