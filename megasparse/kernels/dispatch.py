"""Which implementation of a kernel runs: asked once per call, answered with a reason.

`backend=None` takes Triton for CUDA tensors and the plain-torch reference for everything else.
Asking by name for one that cannot run raises with the reason: nothing falls back silently.
Triton runs on CPU tensors only in Triton's interpreter (TRITON_INTERPRET=1 before the first import
of triton), which the test suite uses to check kernels on machines without a GPU.
"""

from __future__ import annotations

import os
from typing import Literal

import torch

from megasparse.errors import KernelError

Backend = Literal["reference", "triton"]
BACKENDS: tuple[Backend, ...] = ("reference", "triton")


# Triton decides when a kernel is decorated, that is at import; so does this module.
INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") == "1"


def triton_refusal(tensor: torch.Tensor) -> str | None:
    """Why Triton cannot run on this tensor, or None when it can."""
    if tensor.is_cuda or (tensor.device.type == "cpu" and INTERPRETING):
        return None
    return f"the tensor is on {tensor.device} and Triton's interpreter is off"


def resolve(op: str, tensor: torch.Tensor, backend: str | None) -> Backend:
    """The backend that `op` uses for `tensor`.

    Raises KernelError when `backend` is unknown or cannot run on this tensor.
    """
    if backend is None:
        return "triton" if tensor.is_cuda and triton_refusal(tensor) is None else "reference"
    if backend == "reference":
        return "reference"
    if backend != "triton":
        raise KernelError(f"{op}: backend={backend!r}, expected one of {', '.join(BACKENDS)}")
    refusal = triton_refusal(tensor)
    if refusal is not None:
        raise KernelError(f"{op}: backend='triton' cannot run: {refusal}")
    return "triton"
