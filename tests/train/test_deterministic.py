"""--deterministic-mode: what it turns on, and that a run repeats and resumes bit for bit."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from megasparse.errors import EXIT_PREEMPTED
from megasparse.metrics.schema import read_metrics
from tests import dist
from tests.runs import LLAMA, TINY, launch, train
from tests.transformer_engine import needs_transformer_engine

# Products large enough for the choice among cuSPARSELt's algorithms.
GPT = [
    "--num-layers", "4", "--hidden-size", "512", "--num-attention-heads", "8", "--seq-length",
    "1024", "--vocab-size", "5000", "--micro-batch-size", "4", "--global-batch-size", "8", "--bf16",
    "--mock-data", "--train-iters", "10", "--lr", "1e-3", "--eval-iters", "0", "--log-interval",
    "1", "--mask-update-interval", "1", "--dense-tail-fraction", "0", "--deterministic-mode",
]  # fmt: skip
RUNS = {
    "s_ste": ["--sparsity-recipe", "s_ste"],
    "fst, fp8": ["--sparsity-recipe", "fst", "--fp8-format", "e4m3"],
}
# Names of figures that the clock or the allocator decides begin so.
MEASURED = ("tokens_per_second", "tflops", "mfu", "memory_gib", "time_")


def _run(rank, world, flags):
    os.environ["NCCL_ALGO"] = "Tree"  # the user's own choice stays
    rows = train(rank, world, flags)
    names = ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO", "NVTE_ALLOW_NONDETERMINISTIC_ALGO")
    found = {name: os.environ.get(name) for name in names}
    return rows, torch.are_deterministic_algorithms_enabled(), found


def test_a_run_in_deterministic_mode(tmp_path, dataset):
    flags = [*TINY, *LLAMA, "--data-path", dataset, "--attention-dropout", "0.1"]
    flags += ["--train-iters", "5", "--mask-update-interval", "1"]
    plain, on, _ = dist.run(_run, 1, [*flags, "--run-dir", str(tmp_path / "plain")])[0]
    assert not on
    flags += ["--run-dir", str(tmp_path / "run"), "--deterministic-mode"]
    rows, on, environment = dist.run(_run, 1, flags)[0]
    assert on and environment == {
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "NCCL_ALGO": "Tree",
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    }
    # The embedding's gradient is summed in another order than without.
    for row, other in zip(rows, plain, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-5)


def _results(run_dir: Path) -> list[dict[str, Any]]:
    """The rows without what the clock or the allocator decides."""
    rows = read_metrics(run_dir / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(MEASURED)} for row in rows]


@pytest.mark.gpu
@pytest.mark.parametrize("flags", RUNS.values(), ids=RUNS)
def test_on_a_gpu_a_run_repeats_and_resumes_bit_for_bit(tmp_path, flags):
    if "--fp8-format" in flags:
        needs_transformer_engine(torch.device("cuda"))
    launch(tmp_path / "whole", [*GPT, *flags], 0)
    launch(tmp_path / "parts", [*GPT, *flags, "--exit-interval", "5"], EXIT_PREEMPTED)
    launch(tmp_path / "parts", [*GPT, *flags, "--resume"], 0)
    whole = _results(tmp_path / "whole")
    assert _results(tmp_path / "parts") == whole
    assert len(whole) == 10 and whole[-1]["loss"] < whole[0]["loss"]
