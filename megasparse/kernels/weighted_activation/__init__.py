"""An activation times a weight of each row, as experts have it, and its gradients; no autograd."""

from __future__ import annotations

import torch

from megasparse.errors import KernelError
from megasparse.kernels import dispatch
from megasparse.kernels.activation import DTYPES
from megasparse.kernels.activation.kinds import Activation, is_gated
from megasparse.kernels.checks import WIDE_DTYPES, require
from megasparse.kernels.weighted_activation import reference, triton


@torch.no_grad()
def weighted_activation(
    fused: torch.Tensor,
    weights: torch.Tensor,
    activation: Activation = "swiglu",
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """`activated(fused)`, rounded, times the weight of its row, rounded again: (T, F).

    Args:
        fused: (T, 2 F), for "gelu" (T, F); float32, bfloat16 or float16 (float64 with the reference
            alone), copied unless it is contiguous.
        weights: (T,), one of these dtypes.
        activation: "swiglu", "geglu" or "gelu".
        backend: None, "reference" or "triton".

    Raises: KernelError on sizes, dtypes, or a backend that cannot run.
    """
    op = "weighted_activation"
    _check(op, fused, weights, activation)
    run = dispatch.implementation(
        op,
        fused,
        _of_wide(fused, weights, backend),
        reference=reference.weighted_activation,
        triton=triton.weighted_activation,
    )
    with torch.cuda.device_of(fused):  # Triton launches on the current device
        return run(fused, weights, activation)


@torch.no_grad()
def weighted_activation_backward(
    dy: torch.Tensor,
    fused: torch.Tensor,
    weights: torch.Tensor,
    activation: Activation = "swiglu",
    *,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of `weighted_activation`: (T, 2 F) like fused, and (T,) like weights.

    The gradient of the activation itself, `dy` times the weight, is rounded before the activation's
    own is computed from it, as if both were operations of their own. That of a weight is a float32
    sum.

    Args:
        dy: (T, F), of the dtype of fused, copied unless it is contiguous.
        The others: as above.

    Raises: as above.
    """
    op = "weighted_activation_backward"
    _check(op, fused, weights, activation)
    shape = (fused.shape[0], fused.shape[1] // (1 + is_gated(activation)))
    require(op, "dy", dy, fused.dtype, shape, fused.device)
    run = dispatch.implementation(
        op,
        fused,
        _of_wide(fused, weights, backend),
        reference=reference.weighted_activation_backward,
        triton=triton.weighted_activation_backward,
    )
    with torch.cuda.device_of(fused):
        return run(dy, fused, weights, activation)


def _check(op: str, fused: torch.Tensor, weights: torch.Tensor, activation: Activation) -> None:
    parts = 1 + is_gated(activation)
    if fused.dim() != 2 or fused.dtype not in DTYPES or fused.shape[1] % parts:
        raise KernelError(
            f"{op}: fused is {fused.dtype} {tuple(fused.shape)}, expected floats, "
            f"{'(T, 2 F)' if parts == 2 else '(T, F)'}"
        )
    if weights.dtype not in DTYPES:
        raise KernelError(f"{op}: weights are {weights.dtype}, expected floats")
    require(op, "weights", weights, weights.dtype, (fused.shape[0],), fused.device)


def _of_wide(fused: torch.Tensor, weights: torch.Tensor, backend: str | None) -> str | None:
    """Float64 is the reference's."""
    wide = fused.dtype in WIDE_DTYPES and weights.dtype in WIDE_DTYPES
    return "reference" if backend is None and not wide else backend
