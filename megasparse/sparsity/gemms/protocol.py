"""The three GEMMs of a linear layer, as a protocol.

`x_TK` are tokens by inputs, `dz_TN` tokens by outputs, weights `(N, K)`; everything is local to a
rank. Communication is around these (`sparsity/autograd/linear.py`), never inside.

    output       z_TN  = x_TK  @ w_NK^T     contraction over K
    grad_input   dx_TK = dz_TN @ w_NK       contraction over N
    grad_weight  dw_NK = dz_TN^T @ x_TK     contraction over T

Two of them share x and two share dz. What an implementation makes of either for its GEMMs (an FP8
copy, a packed draw) it makes once: `output_keeping` gives what grad_weight wants of x beside z, and
`gradient` what both GEMMs of the backward pass want of dz.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Set
from typing import Any, NamedTuple, Protocol

import torch

# What an x becomes for grad_weight: tensors that autograd saves.
Kept = tuple[torch.Tensor, ...]


class LinearGemms(Protocol):
    """The GEMMs of one linear layer with the operands of one optimizer step.

    Attributes:
        halved: names of the GEMMs that have run on sparse tensor cores, with half of the products.
    """

    halved: Set[str]

    def output(self, x_TK: torch.Tensor) -> torch.Tensor:
        """`X W~^T`, `(T, N)` in the dtype of x."""
        ...

    def output_keeping(self, x_TK: torch.Tensor) -> tuple[torch.Tensor, Kept]:
        """The same, and what `grad_weight` wants of x."""
        ...

    def kept(self, x_TK: torch.Tensor) -> Kept:
        """What `grad_weight` wants of x, without the product."""
        ...

    def gradient(self, dz_TN: torch.Tensor, seed: int) -> Any:
        """What `grad_input` and `grad_weight` want of dZ.

        Args:
            seed: of the layer's draws in this micro-batch.
        """
        ...

    def grad_input(self, gradient: Any) -> torch.Tensor:
        """`dZ W~`, `(T, K)` in the dtype of dz."""
        ...

    def grad_weight(self, gradient: Any, kept: Kept) -> torch.Tensor:
        """`dZ^T X` or `MVUE(dZ^T) X`, `(N, K)`: straight through to the dense master weight."""
        ...


class Gradient(NamedTuple):
    """dZ as it came, with the seed of what is drawn from it."""

    dz_TN: torch.Tensor
    seed: int


class PlainOperands(ABC):
    """For GEMMs that take x and dz as they are."""

    @abstractmethod
    def output(self, x_TK: torch.Tensor) -> torch.Tensor:
        """`X W~^T`, `(T, N)` in the dtype of x."""

    def output_keeping(self, x_TK: torch.Tensor) -> tuple[torch.Tensor, Kept]:
        return self.output(x_TK), (x_TK,)

    def kept(self, x_TK: torch.Tensor) -> Kept:
        return (x_TK,)

    def gradient(self, dz_TN: torch.Tensor, seed: int) -> Gradient:
        return Gradient(dz_TN, seed)
