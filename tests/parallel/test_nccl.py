"""FP8 and 2:4 over NCCL: a layout of two ranks trains as one does.

Each rank has a GPU, or they share the only one (`tools.bench.parts.short_runs`). The matrix of
layouts in BF16 is `tools.bench.scaling`; gloo's tests beside this one are exact.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.transformer_engine import needs_transformer_engine
from tools.bench.parts import short_runs
from tools.experiments.run_queue import visible_gpus

ROOT = Path(__file__).parents[2]
MODEL = [
    "--num-layers", "4", "--hidden-size", "512", "--ffn-hidden-size", "1536",
    "--num-attention-heads", "8", "--num-query-groups", "4", "--seq-length", "512",
    "--vocab-size", "1000", "--micro-batch-size", "2", "--global-batch-size", "8", "--lr", "3e-4",
    "--position-embedding-type", "rope", "--normalization", "RMSNorm", "--swiglu",
    "--disable-bias-linear", "--untie-embeddings-and-output-weights", "--bf16", "--mock-data",
    "--eval-iters", "0", "--train-iters", "100", "--sparsity-recipe", "fst",
    "--mask-update-interval", "4", "--fp8-format", "e4m3",
]  # fmt: skip
TP2 = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
LAYOUTS = {
    "tp 2, sp": TP2,
    "pp 2": ["--pipeline-model-parallel-size", "2"],
    "dp 2, zero 2": ["--zero-stage", "2"],
}
STEPS = 10


CP2 = ["--context-parallel-size", "2"]
CONTEXT = {
    "p2p": CP2,
    "all_gather": [*CP2, "--cp-comm-type", "all_gather"],
    "local": [*CP2, "--transformer-impl", "local"],
    "documents": [*CP2, "--reset-attention-mask", "--reset-position-ids"],
}


@pytest.mark.gpu
def test_attention_over_two_ranks_is_that_of_one():
    """Transformer Engine's, both its exchanges, and torch's with gathered keys and values; in BF16
    without FP8, and with the same draws of MVUE."""
    needs_transformer_engine(torch.device("cuda"))
    gpus = visible_gpus()
    if len(gpus) < 2:
        pytest.skip("needs two GPUs: context parallel ranks exchange over NCCL")
    bf16 = [*MODEL[:-2], "--cuda-graph-impl", "none"]
    apart = CONTEXT["documents"][2:]
    alone = {
        name: {"flags": [*bf16, *more], "steps": STEPS}
        for name, more in (("causal", []), ("documents", apart))
    }
    jobs = {name: {"flags": [*bf16, *more], "steps": STEPS} for name, more in CONTEXT.items()}
    one = short_runs.launch(alone, 1, "cuda", gpus=gpus[:1])
    for name, run in short_runs.launch(jobs, 2, "cuda", gpus=gpus[:2]).items():
        expected = one["documents" if name == "documents" else "causal"]
        assert run["samples"] == expected["samples"]
        # BF16 rounds sums in another order to 8 bits.
        assert run["losses"] == pytest.approx(expected["losses"], rel=2e-3), name


@pytest.mark.gpu
def test_fp8_runs_on_two_ranks_as_on_one():
    needs_transformer_engine(torch.device("cuda"))
    gpus = visible_gpus()[:2]
    alone = {"one": {"flags": MODEL, "steps": STEPS}}
    jobs = {name: {"flags": [*MODEL, *more], "steps": STEPS} for name, more in LAYOUTS.items()}
    one = short_runs.launch(alone, 1, "cuda", gpus=gpus[:1])["one"]
    two = short_runs.launch(jobs, 2, "cuda", gpus=gpus)
    assert list(two) == list(LAYOUTS)
    for run in two.values():
        assert run["samples"] == one["samples"]
        # e4m3 has 3 bits: sums in another order move what is rounded, and masks with it.
        assert run["losses"] == pytest.approx(one["losses"], rel=1e-2)
        assert run["losses"][-1] < run["losses"][0]
