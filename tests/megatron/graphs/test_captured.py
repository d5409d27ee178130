"""Captured runs against eager ones, bit for bit, in deterministic mode."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megasparse.checkpoint.directory import list_steps, step_folder
from megasparse.checkpoint.reader import CheckpointReader
from megasparse.metrics.schema import read_metrics
from tests.dist import free_port
from tests.transformer_engine import needs_transformer_engine

ROOT = Path(__file__).parents[3]
# Three micro-batches a step; masks are refreshed, metrics measured and losses validated on the way.
GPT = [
    "--num-layers", "4", "--hidden-size", "512", "--num-attention-heads", "8", "--seq-length",
    "512", "--vocab-size", "5000", "--micro-batch-size", "4", "--global-batch-size", "12", "--bf16",
    "--mock-data", "--train-iters", "20", "--lr", "1e-3", "--eval-iters", "2", "--eval-interval",
    "8", "--log-interval", "5", "--mask-update-interval", "3", "--deterministic-mode",
    "--sparse-layers", "*.mlp.*", "*.self_attention.linear_*",
]  # fmt: skip
LLAMA = [
    "--position-embedding-type",
    "rope",
    "--normalization",
    "RMSNorm",
    "--swiglu",
    "--disable-bias-linear",
    "--ffn-hidden-size",
    "1024",
]
FP8 = ["--fp8-format", "e4m3"]
PHASES = ["--dense-warmup-fraction", "0.2", "--dense-tail-fraction", "0.25"]
RUNS = {
    "fst": ["--sparsity-recipe", "fst", *PHASES],
    "fst, fp8": ["--sparsity-recipe", "fst", *LLAMA, *FP8, *PHASES],
    # GPT-2's layers: GELU and biases.
    "fst, fp8, gelu": ["--sparsity-recipe", "fst", *FP8, *PHASES],
    "fst, packed by the library": [
        "--sparsity-recipe",
        "fst",
        *LLAMA,
        "--operand-packing",
        "cusparselt",
    ],
    "s_ste": ["--sparsity-recipe", "s_ste", *LLAMA],
    "s_ste, fp8": ["--sparsity-recipe", "s_ste", *LLAMA, *FP8],
    "fst, fp8, current": ["--sparsity-recipe", "fst", *LLAMA, *FP8, "--fp8-recipe", "tensorwise"],
    "fst, fp8, gelu, current": [
        "--sparsity-recipe",
        "fst",
        *FP8,
        *PHASES,
        "--fp8-recipe",
        "tensorwise",
    ],
    "s_ste, fp8, current": [
        "--sparsity-recipe",
        "s_ste",
        *LLAMA,
        *FP8,
        "--fp8-recipe",
        "tensorwise",
    ],
    "ast, fp8, current": ["--sparsity-recipe", "ast", *LLAMA, *FP8, "--fp8-recipe", "tensorwise"],
    "ast": ["--sparsity-recipe", "ast", *LLAMA],
    "ast, fp8": ["--sparsity-recipe", "ast", *LLAMA, *FP8],
    "dense": ["--sparsity-recipe", "dense", *LLAMA],
    "dense, fp8": ["--sparsity-recipe", "dense", *LLAMA, "--fp8-format", "hybrid"],
    # Linears of the attention dense, those of the MLP 2:4.
    "mixed, fp8": [
        "--sparsity-recipe",
        "fst",
        *LLAMA,
        "--fp8-format",
        "hybrid",
        *PHASES,
        "--sparse-layers",
        "*.mlp.*",
    ],
    "fst, ZeRO 2": ["--sparsity-recipe", "fst", *LLAMA, "--zero-stage", "2"],
}
TP2 = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
RECOMPUTE = [
    "--recompute-granularity",
    "full",
    "--recompute-method",
    "uniform",
    "--recompute-num-layers",
    "1",
]
LAYOUTS = {
    "fst, fp8, tp 2, sp": [*RUNS["fst, fp8"], *TP2],
    "fst, fp8, current, tp 2": [
        *RUNS["fst, fp8, current"], "--tensor-model-parallel-size", "2"
    ],
    "fst, fp8, current, tp 2, sp": [*RUNS["fst, fp8, current"], *TP2],
    "fst, fp8, current, pp 2, recomputed": [
        *RUNS["fst, fp8, current"], *RECOMPUTE, "--pipeline-model-parallel-size", "2"
    ],
    "s_ste, fp8, tp 2, sp": [*RUNS["s_ste, fp8"], *TP2],
    "dense, fp8, tp 2, sp": [*RUNS["dense, fp8"], *TP2],
    "ast, tp 2": [*RUNS["ast"], "--tensor-model-parallel-size", "2"],
    "fst, pp 2": [*RUNS["fst"], "--pipeline-model-parallel-size", "2"],
    "fst, fp8, pp 2, recomputed": [
        *RUNS["fst, fp8"], *RECOMPUTE, "--pipeline-model-parallel-size", "2"
    ],
    "fst, dp 2, ZeRO 2": [*RUNS["fst, ZeRO 2"], "--global-batch-size", "24"],
}  # fmt: skip
RUNS["fst, recomputed"] = [*RUNS["fst"], *RECOMPUTE]
RUNS["ste, wanda"] = ["--sparsity-recipe", "ste", *LLAMA, "--mask-metric", "wanda"]
# Layers of newer models: QK norms of heads and a window; norms behind and of all heads together;
# branches side by side with partial rotary positions.
RUNS["fst, fp8, qwen3"] = [*RUNS["fst, fp8"], "--qk-layernorm", "--window-size", "63,0"]
RUNS["fst, olmo2"] = [
    *RUNS["fst"], *LLAMA, "--qk-layernorm", "--qk-layernorm-scope", "all",
    "--norm-placement", "post",
]  # fmt: skip
RUNS["fst, neox"] = [
    *RUNS["fst"], *LLAMA, "--parallel-residual", "--rotary-percent", "0.5", "--no-rope-freq", "2"
]  # fmt: skip
# The attention of layers with experts, and a whole layer without.
EXPERTS = [
    *LLAMA, "--num-experts", "4", "--moe-layer-freq", "[0,1,1,0]", "--moe-ffn-hidden-size", "512",
    "--moe-aux-loss-coeff", "0.01",
]  # fmt: skip
RUNS["fst, experts"] = ["--sparsity-recipe", "fst", *EXPERTS, *PHASES]
RUNS["s_ste, fp8, experts"] = ["--sparsity-recipe", "s_ste", *EXPERTS, *FP8]
# Names of metrics that the clock or the allocator decides begin so.
MEASURED = ("tokens_per_second", "tflops", "mfu", "memory_gib", "time_")


def _pretrain(run_dir: Path, flags: list[str], ranks: int = 1) -> str:
    launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
    launcher += ["--master-port", str(free_port())] if ranks > 1 else []
    command = [sys.executable, *launcher, str(ROOT / "launch" / "pretrain.py"), *GPT, *flags]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [*command, "--run-dir", str(run_dir)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def _results(run_dir: Path) -> tuple[list[dict[str, Any]], CheckpointReader]:
    """Rows without what the clock or the allocator decides, and the last checkpoint."""
    rows = read_metrics(run_dir / "metrics.jsonl")
    rows = [{k: v for k, v in row.items() if not k.startswith(MEASURED)} for row in rows]
    root = run_dir / "checkpoints"
    return rows, CheckpointReader(step_folder(root, max(list_steps(root))))


@pytest.mark.gpu
@pytest.mark.parametrize("flags", RUNS.values(), ids=RUNS)
def test_a_captured_run_is_the_eager_one(tmp_path, flags):
    if "--fp8-format" in flags:
        needs_transformer_engine(torch.device("cuda"))
    _compare(tmp_path, flags, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("flags", LAYOUTS.values(), ids=LAYOUTS)
def test_a_captured_run_of_two_ranks_is_the_eager_one(tmp_path, flags):
    """Needs a GPU for each rank. CPUs run such layouts with emulated replays
    (`test_layer_graphs.py`)."""
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs, found {torch.cuda.device_count()}")
    needs_transformer_engine(torch.device("cuda"))
    _compare(tmp_path, flags, 2)


def _compare(tmp_path: Path, flags: list[str], ranks: int) -> None:
    log = _pretrain(tmp_path / "captured", flags, ranks)
    assert "layers captured" in log, log[-3000:]
    eager = _pretrain(tmp_path / "eager", [*flags, "--cuda-graph-impl", "none"], ranks)
    assert "layers captured" not in eager
    (rows, saved), (expected, other) = _results(tmp_path / "captured"), _results(tmp_path / "eager")
    assert rows == expected and len(rows) == 20
    assert sorted(saved.keys()) == sorted(other.keys())
    names = sorted(saved.keys())
    unlike = [key for key in names if not torch.equal(saved.read(key), other.read(key))]
    assert not unlike
