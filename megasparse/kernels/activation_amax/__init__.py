"""Largest magnitudes of an activation and of its gradient, neither of which is written.

A tensor that is scaled by its own magnitude is computed twice then: once for that, and once by the
kernel that quantizes it. It is not written in 16 bits and read again.
"""

from __future__ import annotations

import torch

from megasparse.errors import KernelError
from megasparse.kernels import dispatch
from megasparse.kernels.activation.kinds import Activation, is_gated
from megasparse.kernels.activation_amax import reference, triton
from megasparse.kernels.checks import require
from megasparse.kernels.factors import Factors, lacking

DTYPES = (torch.bfloat16, torch.float16)


@torch.no_grad()
def activation_amax(
    fused: torch.Tensor,
    activation: Activation = "swiglu",
    *,
    factors: Factors | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """float32 (1,): the largest magnitude of `activated(fused)`, rounded to 16 bits; NaN for a NaN.

    Nothing waits for the device.

    Args:
        fused: (T, 2 F) [gate | x], for "gelu" (T, F), 16 bits, read row-major (copied otherwise).
        activation: "swiglu", "geglu" or "gelu".
        factors: what `fused` lacks (`kernels/factors.py`), a power of two; None: nothing.
        backend: None, "reference" or "triton".

    Raises: KernelError on sizes, dtypes, or a backend that cannot run.
    """
    op = "activation_amax"
    _check(op, fused, activation)
    run = dispatch.implementation(
        op, fused, backend, reference=reference.activation_amax, triton=triton.activation_amax
    )
    with torch.cuda.device_of(fused):  # Triton launches on the current device
        return run(fused, activation, lacking(op, factors, fused.device))


@torch.no_grad()
def activation_grad_amax(
    dy: torch.Tensor,
    fused: torch.Tensor,
    activation: Activation = "swiglu",
    *,
    dy_factors: Factors | None = None,
    factors: Factors | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """The same of the gradient with respect to `fused`, `activation_backward(dy, fused)`.

    Args:
        dy: (T, F), of the dtype of fused.
        dy_factors: what dy lacks.
        Others: of `activation_amax`.
    """
    op = "activation_grad_amax"
    _check(op, fused, activation)
    width = fused.shape[1] // (1 + is_gated(activation))
    require(op, "dy", dy, fused.dtype, (fused.shape[0], width), fused.device)
    run = dispatch.implementation(
        op,
        fused,
        backend,
        reference=reference.activation_grad_amax,
        triton=triton.activation_grad_amax,
    )
    lacks = (lacking(op, one, fused.device) for one in (dy_factors, factors))
    with torch.cuda.device_of(fused):  # Triton launches on the current device
        return run(dy, fused, activation, *lacks)


def _check(op: str, fused: torch.Tensor, activation: Activation) -> None:
    parts = 1 + is_gated(activation)
    if fused.dim() != 2 or fused.dtype not in DTYPES or not fused.numel() or fused.shape[1] % parts:
        raise KernelError(
            f"{op}: fused is {fused.dtype} of shape {tuple(fused.shape)}, expected 16 bits, "
            f"(T, {'2 F' if parts == 2 else 'F'})"
        )
