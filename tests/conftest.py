"""Settings of the whole suite: Triton's interpreter, visible GPU skips, one CPU thread a rank."""

from __future__ import annotations

import os

import torch

# Before anything imports triton: without a GPU its kernels run in the interpreter.
HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip `gpu` tests, with the reason in the report, where there is no CUDA device."""
    skip = pytest.mark.skip(reason="CUDA devices needed: 1, found on this machine: 0")
    for item in items:
        if not HAS_GPU and item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernel tests run: the GPU when there is one, else the CPU (Triton interpreted)."""
    return torch.device("cuda" if HAS_GPU else "cpu")
