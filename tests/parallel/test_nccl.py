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
