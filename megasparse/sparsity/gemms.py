"""The three GEMMs of a linear layer, as a protocol and its plain-torch implementations.

`x_TK` are tokens by inputs, `dz_TN` tokens by outputs, weights `(N, K)`; everything is local to a
rank. Communication is around these (`sparsity/linear.py`), never inside.

    output       z_TN  = x_TK  @ w_NK^T     contraction over K
    grad_input   dx_TK = dz_TN @ w_NK       contraction over N
    grad_weight  dw_NK = dz_TN^T @ x_TK     contraction over T
"""

from __future__ import annotations

from typing import Protocol

import torch

from megasparse.kernels import mvue24
from megasparse.sparsity.recipe import Mvue
from megasparse.sparsity.shard import Section


class LinearGemms(Protocol):
    """The GEMMs of one linear layer with the operands of one optimizer step."""

    def output(self, x_TK: torch.Tensor) -> torch.Tensor: ...

    def grad_input(self, dz_TN: torch.Tensor) -> torch.Tensor: ...

    def grad_weight(self, dz_TN: torch.Tensor, x_TK: torch.Tensor, seed: int) -> torch.Tensor: ...


class DenseGemms:
    """All three GEMMs dense."""

    def __init__(self, w_NK: torch.Tensor) -> None:
        self._w_NK = w_NK.detach()

    def output(self, x_TK: torch.Tensor) -> torch.Tensor:
        return x_TK @ self._w_NK.t()

    def grad_input(self, dz_TN: torch.Tensor) -> torch.Tensor:
        return dz_TN @ self._w_NK

    def grad_weight(self, dz_TN: torch.Tensor, x_TK: torch.Tensor, seed: int) -> torch.Tensor:
        return dz_TN.t() @ x_TK


class ReferenceSparseGemms(DenseGemms):
    """2:4 GEMMs computed densely on pruned operands: what the hardware computes, on any device.

    Args:
        effective_NK: W~, 2:4 along K (and along N for a transposable mask).
        mvue: how dZ^T is pruned along tokens.
        channels: where the local output channels lie in the whole layer, so that every
            tensor-parallel degree draws the same random numbers.
    """

    def __init__(
        self, effective_NK: torch.Tensor, mvue: Mvue, channels: tuple[Section, ...]
    ) -> None:
        super().__init__(effective_NK)
        self._mvue = mvue
        self._channels = channels

    def grad_weight(self, dz_TN: torch.Tensor, x_TK: torch.Tensor, seed: int) -> torch.Tensor:
        if self._mvue != "off":
            dz_TN = self._prune_along_tokens(dz_TN, seed)
        return dz_TN.t() @ x_TK

    def _prune_along_tokens(self, dz_TN: torch.Tensor, seed: int) -> torch.Tensor:
        pruned = [
            mvue24(
                dz_TN.narrow(1, s.local_start, s.length),
                seed=seed,
                dim=0,
                offsets=(0, s.global_start),
                exact=self._mvue == "exact",
            )
            for s in self._channels
        ]
        return pruned[0] if len(pruned) == 1 else torch.cat(pruned, 1)
