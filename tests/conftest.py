"""Settings of the whole suite: Triton's interpreter, visible GPU skips, one CPU thread a rank."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import torch

# Before anything imports triton: without a GPU its kernels run in the interpreter.
HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tests have more ranks than the machine has cores. Without this a message that arrives interrupts
# whoever computes, and four ranks spend half of their time on changing places.
if hasattr(os, "SCHED_BATCH"):
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))

# Under `nohup` runs leave SIGHUP ignored, as they should; tests send it to runs of a terminal.
# What a program starts gets the default in place of a handler, but not in place of SIG_IGN.
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)

import pytest  # noqa: E402

from tests import quick_python as quick  # noqa: E402
from tests.order import place  # noqa: E402
from tests.runs import make_dataset  # noqa: E402
from tests.thorough import thorough  # noqa: E402

if not HAS_GPU:
    from tests.interpreter import make_faster

    make_faster()


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first, mark `thorough` tests, and skip `gpu` tests where torch has no
    CUDA device.

    The report names each that is skipped, with the reason. They run kernels that exist for GPUs
    only; CPUs test the same semantics by `reference.py`, gloo and Triton's interpreter.
    """
    items.sort(key=lambda item: place(item.path))
    skip = pytest.mark.skip(reason="needs a CUDA device, and torch.cuda.is_available() is False")
    for item in thorough(items, HAS_GPU):
        item.add_marker(pytest.mark.thorough)
    for item in items:
        if not HAS_GPU and item.get_closest_marker("gpu"):
            item.add_marker(skip)


def pytest_collection_finish() -> None:
    """Let the collector pass over modules and collected tests, which stay to the end."""
    gc.freeze()


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernel tests run: the GPU when there is one, else the CPU (Triton interpreted)."""
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> str:
    """A tiny dataset that whole runs share."""
    return make_dataset(tmp_path_factory.mktemp("tiny") / "data")


@pytest.fixture(scope="session")
def quick_python(tmp_path_factory) -> Iterator[Path]:
    """A `python` for commands whose imports are not what is tested (`tests/quick_python.py`)."""
    path, server = quick.start(tmp_path_factory.mktemp("python"))
    yield path
    server.kill()
    server.join()
