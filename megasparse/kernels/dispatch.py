"""Which implementation of a kernel runs: asked once per call, answered with a reason.

`backend=None` takes the op's fast backend (Triton; cuSPARSELt for the GEMM) for CUDA tensors and
the plain-torch reference for everything else. Asking by name for one that cannot run raises with
the reason: nothing falls back silently.
Triton runs on CPU tensors only in Triton's interpreter (TRITON_INTERPRET=1 before the first import
of triton), which the test suite uses to check kernels on machines without a GPU.
"""

from __future__ import annotations

import os
from typing import Literal, TypeVar

import torch

from megasparse.errors import KernelError

Backend = Literal["reference", "triton", "cusparselt"]
One = TypeVar("One")


# Triton decides when a kernel is decorated, that is at import; so does this module.
INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") == "1"


def triton_refusal(tensor: torch.Tensor) -> str | None:
    """Why Triton cannot run on this tensor, or None when it can."""
    if tensor.is_cuda or (tensor.device.type == "cpu" and INTERPRETING):
        return None
    return f"the tensor is on {tensor.device} and Triton's interpreter is off"


def cusparselt_refusal(tensor: torch.Tensor) -> str | None:
    """Why cuSPARSELt cannot run on this tensor, or None when it can."""
    if not tensor.is_cuda:
        return f"the tensor is on {tensor.device}, cuSPARSELt needs CUDA"
    if not torch.backends.cusparselt.is_available():
        return "this torch was built without cuSPARSELt"
    return None


_REFUSALS = {"triton": triton_refusal, "cusparselt": cusparselt_refusal}


def resolve(
    op: str,
    tensor: torch.Tensor,
    backend: str | None,
    fast: Literal["triton", "cusparselt"] = "triton",
) -> Backend:
    """The backend that `op` uses for `tensor`: the reference or the op's `fast` one.

    Raises KernelError when `backend` is not one of the two or cannot run on this tensor.
    """
    if backend is None:
        backend = fast if tensor.is_cuda else "reference"
    if backend == "reference":
        return "reference"
    if backend != fast:
        raise KernelError(f"{op}: backend={backend!r}, expected one of reference, {fast}")
    refusal = _REFUSALS[fast](tensor)
    if refusal is not None:
        raise KernelError(f"{op}: backend={fast!r} cannot run: {refusal}")
    return fast


def implementation(
    op: str,
    tensor: torch.Tensor,
    backend: str | None,
    *,
    reference: One,
    triton: One | None = None,
    cusparselt: One | None = None,
) -> One:
    """The one of an op's two implementations (functions or modules) that runs for `tensor`.

    Args:
        op: its name, for errors.
        tensor: whose device decides.
        backend: None, or the name of one of the two that are given.
        reference: the definition.
        triton, cusparselt: the fast one, of which an op has one.

    Raises: KernelError as `resolve`.
    """
    fast = cusparselt if triton is None else triton
    assert fast is not None, f"{op}: no fast implementation"
    name = resolve(op, tensor, backend, "cusparselt" if triton is None else "triton")
    return reference if name == "reference" else fast
