"""--deterministic-mode: what it turns on, and that every operation of a run has an order."""

from __future__ import annotations

import os

import pytest
import torch

from tests import dist
from tests.runs import LLAMA, TINY, train


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
