"""Weights that are never trained, kept in FP8 alone: half the memory of 16 bits."""

from __future__ import annotations

import torch

from megasparse.sparsity.gemms.protocol import (
    Deferred,
    GradOutput,
    PlainOperands,
    SavedInput,
    with_bias,
)
from megasparse.sparsity.projection import Projected


class Fp8StoredGemms(PlainOperands):
    """A frozen weight kept in e4m3 with a scale a row: half the memory of 16 bits.

    It is brought back to the input's precision where it is used, so the GEMM is a dense one; there
    is no gradient to compute.

    Args:
        w_NK: the weight, which is not kept.
    """

    def __init__(self, w_NK: torch.Tensor) -> None:
        self.ran_sparse: set[str] = set()
        w = w_NK.detach().float()
        largest = torch.finfo(torch.float8_e4m3fn).max
        self._scale_inv_N = (w.abs().amax(1) / largest).clamp(min=torch.finfo(w.dtype).tiny)
        self._codes_NK = (w / self._scale_inv_N[:, None]).to(torch.float8_e4m3fn)

    @property
    def bytes_here(self) -> int:
        """Memory of codes and scales."""
        return self._codes_NK.numel() + 4 * self._scale_inv_N.numel()

    def refill(self, w_NK: torch.Tensor, projected: Projected | None) -> None:
        raise RuntimeError("a frozen weight does not change")

    def output(self, x_TK: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        z_TN = (x_TK @ self._codes_NK.to(x_TK.dtype).t()) * self._scale_inv_N.to(x_TK.dtype)
        return with_bias(z_TN, bias)

    def grad_input(self, operands: GradOutput, deferred: Deferred | None = None) -> torch.Tensor:
        raise RuntimeError("a frozen weight has no backward pass")

    def grad_weight(self, operands: GradOutput, saved: SavedInput) -> torch.Tensor:
        raise RuntimeError("a frozen weight has no backward pass")
