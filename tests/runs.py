"""Tiny whole runs for tests: a dataset made once, and a run as a function of its flags."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

VOCAB = 128

# 2 layers, 64 wide: a step takes milliseconds. Dropout off, so that layouts can be compared.
TINY = [
    "--num-layers", "2", "--hidden-size", "64", "--num-attention-heads", "4",
    "--seq-length", "32", "--micro-batch-size", "2", "--global-batch-size", "4",
    "--train-iters", "20", "--lr", "1e-3", "--vocab-size", str(VOCAB),
    "--make-vocab-size-divisible-by", "16", "--sparsity-recipe", "fst",
    "--mask-update-interval", "4", "--masked-decay", "1e-3", "--dense-tail-fraction", "0",
    "--eval-iters", "0", "--split", "90,10,0",
]  # fmt: skip

LLAMA = [
    "--position-embedding-type", "rope", "--normalization", "RMSNorm", "--swiglu",
    "--disable-bias-linear", "--untie-embeddings-and-output-weights", "--num-query-groups", "2",
    "--ffn-hidden-size", "96",
]  # fmt: skip


def make_dataset(prefix: Path, documents: int = 60, seed: int = 0) -> str:
    """A dataset of learnable sequences (each token follows from the one before, with noise)."""
    from megasparse.data.indexed_writer import IndexedDatasetWriter

    generator = np.random.default_rng(seed)
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for _ in range(documents):
            length = int(generator.integers(40, 120))
            tokens = np.zeros(length, np.uint16)
            for i in range(1, length):
                follow = (int(tokens[i - 1]) * 5 + 7) % VOCAB
                noise = int(generator.integers(VOCAB))
                tokens[i] = noise if generator.random() < 0.1 else follow
            writer.add_document(tokens)
        writer.finish()
    return str(prefix)


def train(rank: int, world: int, flags: list[str]) -> list[dict[str, Any]]:
    """Run to the end on this rank (inside `tests.dist.run`); the rows of metrics.jsonl."""
    from megasparse.config import load_config, resolve
    from megasparse.metrics.schema import read_metrics
    from megasparse.train.main import pretrain

    config = resolve(load_config(flags), world)
    pretrain(config)
    return read_metrics(Path(config.checkpoint.run_dir) / "metrics.jsonl")


def launch(run_dir: Path, flags: list[str], expected: int = 0) -> list[dict[str, Any]]:
    """A run as its users start it, on the GPU if there is one; it has to end with a status.

    The report at its end reads the checkpoint, and is an error where a weight is not 2:4.
    """
    from megasparse.metrics.schema import read_metrics

    root = Path(__file__).parents[1]
    command = [sys.executable, str(root / "launch" / "pretrain.py"), *flags]
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [*command, "--run-dir", str(run_dir)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        timeout=300,
    )
    assert done.returncode == expected, done.stdout[-1000:] + done.stderr[-3000:]
    return read_metrics(run_dir / "metrics.jsonl")
