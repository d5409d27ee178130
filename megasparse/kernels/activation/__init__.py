"""Activations with gradients, in any dense layout; gated ones of two tensors or of a fused one."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from megasparse.errors import KernelError
from megasparse.kernels import dispatch
from megasparse.kernels.activation import reference, triton
from megasparse.kernels.activation.kinds import Activation, is_gated
from megasparse.kernels.checks import require
from megasparse.kernels.factors import Factors, lacking

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class _GatedActivation(torch.autograd.Function):
    """y = act(gate) * x. Saves x and gate; the backward pass recomputes the activation."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, gate: torch.Tensor, gelu: bool, chosen: ModuleType
    ) -> torch.Tensor:
        ctx.save_for_backward(x, gate)
        ctx.gelu, ctx.chosen = gelu, chosen
        return chosen.forward(x, gate, gelu)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, gate = ctx.saved_tensors
        dx, dgate = ctx.chosen.backward(dy, x, gate, ctx.gelu)
        return dx, dgate, None, None


class _Fused(torch.autograd.Function):
    """The same of `[gate | x]` (of "gelu" the gate alone), whose gradient is one tensor."""

    @staticmethod
    def forward(
        ctx: Any, fused: torch.Tensor, activation: Activation, chosen: ModuleType
    ) -> torch.Tensor:
        ctx.save_for_backward(fused)
        ctx.activation, ctx.chosen = activation, chosen
        return chosen.forward_fused(fused, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (fused,) = ctx.saved_tensors
        return ctx.chosen.backward_fused(dy, fused, ctx.activation), None, None


def swiglu(x: torch.Tensor, gate: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
    """silu(gate) * x, with autograd (FST, section on gated activations).

    Args:
        x, gate: the same shape (any number of dimensions) and dtype: float32, bfloat16, float16
            (float64 on the reference only). Row-major, column-major (transposed strides) and
            halves of a fused tensor are read in place, along memory; other strides are copied.
        backend: None, "reference" or "triton".

    Returns: like x, dense, with x's order of strides; the gradients follow x and gate likewise.
    Arithmetic is float32. Differentiable once.

    Raises: KernelError when shapes, dtypes or devices differ or the backend cannot run.
    """
    return _apply("swiglu", x, gate, False, backend)


def geglu(x: torch.Tensor, gate: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
    """gelu(gate) * x with the tanh GELU, with autograd; all else as in `swiglu`."""
    return _apply("geglu", x, gate, True, backend)


def swiglu_fused(fused: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
    """silu(gate) * x of `fused` = [gate | x], (..., 2 F) -> (..., F), with autograd.

    The values and gradients of `swiglu` on the two halves; the gradient is one tensor in the layout
    of `fused`, so nothing is joined after. All else as in `swiglu`.

    Raises: KernelError too when the last dimension is odd.
    """
    return activated(fused, "swiglu", backend=backend)


def geglu_fused(fused: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
    """gelu(gate) * x of `fused` = [gate | x], the tanh GELU; all else as in `swiglu_fused`."""
    return activated(fused, "geglu", backend=backend)


def activated(
    projected: torch.Tensor, activation: Activation, *, backend: str | None = None
) -> torch.Tensor:
    """`swiglu_fused`, `geglu_fused` or, for "gelu", gelu(projected) in its tanh form, by name."""
    _check_fused(activation, projected, activation)
    return _Fused.apply(projected, activation, _chosen(activation, projected, backend))


@torch.no_grad()
def activation_backward(
    dy: torch.Tensor,
    projected: torch.Tensor,
    activation: Activation,
    *,
    dy_factors: Factors | None = None,
    factors: Factors | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """The gradient of `activated`, like `projected`, from that of its result, outside autograd.

    Args:
        dy_factors, factors: what dy and `projected` lack (`kernels/factors.py`), powers of two;
            None: nothing.
        Others: of `activated`.

    Raises: KernelError when dy is not like the result, or as in `activated`.
    """
    op = "activation_backward"
    _check_fused(op, projected, activation)
    shape = (*projected.shape[:-1], projected.shape[-1] // (1 + is_gated(activation)))
    require(op, "dy", dy, projected.dtype, shape, projected.device)
    lacks = (lacking(op, one, projected.device) for one in (dy_factors, factors))
    return _chosen(op, projected, backend).backward_fused(dy, projected, activation, *lacks)


def _chosen(op: str, tensor: torch.Tensor, backend: str | None) -> ModuleType:
    return dispatch.implementation(op, tensor, backend, reference=reference, triton=triton)


def _check_fused(op: str, fused: torch.Tensor, activation: Activation) -> None:
    parts = 1 + is_gated(activation)
    if fused.dtype not in DTYPES or fused.dim() == 0 or fused.shape[-1] % parts:
        even = " with an even last dimension" if parts == 2 else ""
        raise KernelError(
            f"{op}: fused is {fused.dtype} {tuple(fused.shape)}, expected float32, bfloat16, "
            f"float16 or float64{even}"
        )


def _apply(
    op: str, x: torch.Tensor, gate: torch.Tensor, gelu: bool, backend: str | None
) -> torch.Tensor:
    if x.shape != gate.shape or x.dtype != gate.dtype or x.device != gate.device:
        raise KernelError(
            f"{op}: x is {x.dtype} {tuple(x.shape)} on {x.device} and gate is {gate.dtype} "
            f"{tuple(gate.shape)} on {gate.device}, expected the same"
        )
    if x.dtype not in DTYPES:
        raise KernelError(f"{op}: x is {x.dtype}, expected float32, bfloat16, float16 or float64")
    return _GatedActivation.apply(x, gate, gelu, _chosen(op, x, backend))
