"""The autograd function of a linear layer: three GEMMs, with communication around them.

    forward    x = gather(x_local);            z = output(x)
    backward   dx = grad_input(dz); start reduce(dx);  dw = grad_weight(dz, x); wait for dx

`dW` is computed while `dX` travels: that is why communication surrounds the GEMMs and is not a
separate autograd node. Biases are the callers' business.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from megasparse.sparsity.gemms import LinearGemms


class LinearComm(Protocol):
    """What happens to the input before, and to its gradient after, the GEMMs of this rank."""

    def gather(self, x_local: torch.Tensor) -> torch.Tensor:
        """The input that the GEMMs see, from what this rank holds."""
        ...

    def reduce(self, dx: torch.Tensor) -> tuple[torch.Tensor, Callable[[], object]]:
        """Start to reduce the gradient of that input; the result is valid after calling `wait`."""
        ...


class NoComm:
    """A linear layer whose rank holds its whole input."""

    def gather(self, x_local: torch.Tensor) -> torch.Tensor:
        return x_local

    def reduce(self, dx: torch.Tensor) -> tuple[torch.Tensor, Callable[[], object]]:
        return dx, lambda: None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_local: torch.Tensor,
        weight: torch.Tensor,
        gemms: LinearGemms,
        comm: LinearComm,
        seed: int,
    ) -> torch.Tensor:
        ctx.save_for_backward(x_local)
        ctx.gemms, ctx.comm, ctx.seed = gemms, comm, seed
        x = comm.gather(x_local)
        z_TN = gemms.output(x.reshape(-1, x.shape[-1]))
        return z_TN.view(*x.shape[:-1], z_TN.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (dz,) = grads
        (x_local,) = ctx.saved_tensors
        dz_TN = dz.reshape(-1, dz.shape[-1])
        dx, dw, wait = None, None, None
        # Gathered again rather than kept: that is what sequence parallelism saves memory for.
        x = ctx.comm.gather(x_local) if ctx.needs_input_grad[1] else None
        if ctx.needs_input_grad[0]:
            dx_TK = ctx.gemms.grad_input(dz_TN)
            dx, wait = ctx.comm.reduce(dx_TK.view(*dz.shape[:-1], dx_TK.shape[-1]))
        if x is not None:
            dw = ctx.gemms.grad_weight(dz_TN, x.reshape(-1, x.shape[-1]), ctx.seed)
        if wait is not None:
            wait()
        return dx, dw, None, None, None


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    gemms: LinearGemms,
    comm: LinearComm | None = None,
    seed: int = 0,
) -> torch.Tensor:
    """`x W~^T` with gradients, through the three GEMMs.

    Args:
        x: `(..., K)`, this rank's input.
        weight: the master weight `(N, K)`; gets the straight-through gradient `dZ^T X`.
        gemms: operands and GEMMs of the current optimizer step.
        comm: communication of the input and its gradient; none by default.
        seed: of the MVUE draws of this layer and micro-batch.

    Returns:
        `(..., N)`; the leading dimensions are those of the gathered input.
    """
    return _Linear.apply(x, weight, gemms, comm or NoComm(), seed)
