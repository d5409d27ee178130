"""Settings of the whole suite: Triton's interpreter, visible GPU skips, one CPU thread a rank."""

from __future__ import annotations

import os
from typing import Any

import torch

# Before anything imports triton: without a GPU its kernels run in the interpreter.
HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402

from tests.runs import make_dataset  # noqa: E402

if not HAS_GPU:
    from triton.runtime import interpreter

    _patched: set[Any] = set()

    def _call_device_function(self: Any, *args: Any, **kwargs: Any) -> Any:
        """As Triton's interpreter does, but for replacing the functions of `triton.language`.

        It does so at a kernel's start, and again at every call of a device function, never undoing
        that; the first time is needed for the language that Triton's own library sees, the others
        take most of the interpreter's time.
        """
        if self.fn not in _patched:
            _patched.add(self.fn)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = _call_device_function


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip `gpu` tests where torch has no CUDA device; the report names each, with the reason.

    They run kernels that exist for GPUs only. CPUs test the same semantics by `reference.py`, gloo
    and Triton's interpreter.
    """
    skip = pytest.mark.skip(reason="needs a CUDA device, and torch.cuda.is_available() is False")
    for item in items:
        if not HAS_GPU and item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernel tests run: the GPU when there is one, else the CPU (Triton interpreted)."""
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> str:
    """A tiny dataset that whole runs share."""
    return make_dataset(tmp_path_factory.mktemp("tiny") / "data")
