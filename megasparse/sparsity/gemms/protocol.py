"""The three GEMMs of a linear layer, as a protocol.

`x_TK` are tokens by inputs, `dz_TN` tokens by outputs, weights `(N, K)`; everything is local to a
rank. Communication is around these (`sparsity/autograd/linear.py`), never inside.

    output       z_TN  = x_TK  @ w_NK^T     contraction over K
    grad_input   dx_TK = dz_TN @ w_NK       contraction over N
    grad_weight  dw_NK = dz_TN^T @ x_TK     contraction over T

Two of them share x and two share dz. What an implementation makes of either for its GEMMs (an FP8
copy, a packed draw) it makes once: `output_and_saved` gives what grad_weight needs of x beside z,
and `prepare_grad_output` what both GEMMs of the backward pass need of dz.

An object lives as long as its phase of the run. `refill` gives it the weight of an optimizer step;
its buffers stay where they are, so that captured passes find them again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from megasparse.fp8.scale import Largest, Scale
from megasparse.kernels import Activation, activated, activation_backward, rescale_
from megasparse.kernels.factors import Factors
from megasparse.kernels.random import SeedLike
from megasparse.sparsity.gradient_sum import GradientSum
from megasparse.sparsity.projection import Projected


@dataclass
class Deferred:
    """Takes what a product still lacks, for a caller whose next kernel applies it.

    Attributes:
        factors: of `kernels/factors.py`; None: it lacks nothing.
    """

    factors: Factors | None = None


# What an x becomes for grad_weight: tensors that autograd saves.
SavedInput = tuple[torch.Tensor, ...]


class LinearGemms(Protocol):
    """The GEMMs of one linear layer.

    Attributes:
        ran_sparse: names of the GEMMs that have run on sparse tensor cores, with half of the
            products.
        strided: a transposed copy of x, for grad_weight, has its tokens in the order of strided
            groups (`kernels/token_order.py`).
        total: where gradients of the weight are added up; None: they are autograd's.
    """

    ran_sparse: set[str]
    strided: bool
    total: GradientSum | None

    def refill(self, w_NK: torch.Tensor, projected: Projected | None) -> None:
        """Make the operands of the weight for an optimizer step.

        Args:
            w_NK: the master weight.
            projected: how it is pruned; None in a dense phase.
        """
        ...

    def input_scale(self, largest: Largest) -> Scale | None:
        """The scale with which a kernel that computes x may quantize it to e4m3, for
        `output_of_quantized`; None: x is wanted in full.

        Args:
            largest: computes the magnitude of x, where that is needed.
        """
        ...

    def output(self, x_TK: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """`X W~^T + bias`, `(T, N)` in the dtype of x.

        Args:
            bias: `(N,)`; where the GEMM adds it the sum is rounded once.
        """
        ...

    def output_and_saved(
        self,
        x_TK: torch.Tensor,
        bias: torch.Tensor | None = None,
        save: bool = True,
        deferred: Deferred | None = None,
    ) -> tuple[torch.Tensor, SavedInput]:
        """The same, and with `save` what `grad_weight` needs of x.

        Args:
            deferred: may get what the product still lacks.
        """
        ...

    def output_of_quantized(
        self,
        row: torch.Tensor,
        x_KT: torch.Tensor | None,
        tokens: int,
        x: Scale,
        bias: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        deferred: Deferred | None = None,
    ) -> tuple[torch.Tensor, SavedInput]:
        """`output` (with `x_KT` `output_and_saved`) of an x quantized by `input_scale`.

        Args:
            row: (T', K) e4m3, whole tiles of tokens.
            x_KT: (K, T') e4m3, its tokens in the order that `strided` says; or None.
            tokens: T.
            x: their scale.
            out: `(T', N)` bfloat16, contiguous: gets the result.
            deferred: may get what the product still lacks.
        """
        ...

    def output_of_activated(
        self,
        projected_TF: torch.Tensor,
        activation: Activation,
        save: bool,
        bias: torch.Tensor | None = None,
        factors: Factors | None = None,
    ) -> tuple[torch.Tensor, SavedInput]:
        """`output` (with `save` `output_and_saved`) of `activated(projected_TF, activation)`.

        Args:
            projected_TF: (T, 2 K) [gate | up], of an activation that is not gated (T, K); 16 bits.
            factors: what it lacks.
        """
        ...

    def save_input(self, x_TK: torch.Tensor) -> SavedInput:
        """What `grad_weight` needs of x, without the product."""
        ...

    def save_quantized(self, row: torch.Tensor) -> SavedInput:
        """What `grad_weight` needs of an x quantized by `input_scale`, whose magnitudes counted."""
        ...

    def prepare_grad_output(
        self, dz_TN: torch.Tensor, seed: SeedLike, sums: torch.Tensor | None = None
    ) -> Any:
        """What `grad_input` and `grad_weight` need of dZ.

        Args:
            seed: of the layer's draws in this micro-batch; an int, or int64 on the device.
            sums: `(N,)`, at least float32: gets the sum of dZ over tokens, a bias's gradient.
        """
        ...

    def prepare_activated_grad_output(
        self,
        dy_TF: torch.Tensor,
        projected_TF: torch.Tensor,
        activation: Activation,
        seed: SeedLike,
        sums: torch.Tensor | None = None,
        factors: tuple[Factors | None, Factors | None] = (None, None),
    ) -> Any:
        """`prepare_grad_output` of the gradient of `projected_TF`, this layer's output, from that
        of its activation, `dy_TF`.

        Args:
            factors: what `dy_TF` and `projected_TF` lack.
        """
        ...

    def grad_input(self, operands: Any, deferred: Deferred | None = None) -> torch.Tensor:
        """`dZ W~`, `(T, K)` in the dtype of dz.

        Args:
            deferred: may get what the product still lacks.
        """
        ...

    def grad_weight(self, operands: Any, saved: SavedInput) -> torch.Tensor:
        """`dZ^T X` or `MVUE(dZ^T) X`, `(N, K)`: straight through to the dense master weight."""
        ...

    def grad_weight_to_scale(
        self, operands: Any, saved: SavedInput
    ) -> tuple[torch.Tensor, Factors | None]:
        """`grad_weight`, and the factors of `accumulate_` that it still lacks."""
        ...


class GradOutput(NamedTuple):
    """dZ as it came, with the seed of what is drawn from it."""

    dz_TN: torch.Tensor
    seed: SeedLike


def sum_over_tokens(dz_TN: torch.Tensor, sums: torch.Tensor | None) -> None:
    """Fill `sums` `(N,)`, where it is wanted."""
    if sums is not None:
        torch.sum(dz_TN, 0, dtype=sums.dtype, out=sums)


class PlainOperands(ABC):
    """For GEMMs that take x and dz as they are, in full."""

    strided = False  # they have no transposed copy
    total: GradientSum | None = None

    @abstractmethod
    def grad_weight(self, operands: Any, saved: SavedInput) -> torch.Tensor:
        """`dZ^T X`, `(N, K)`."""

    def grad_weight_to_scale(
        self, operands: Any, saved: SavedInput
    ) -> tuple[torch.Tensor, Factors | None]:
        return self.grad_weight(operands, saved), None

    def input_scale(self, largest: Largest) -> Scale | None:
        return None

    @abstractmethod
    def output(self, x_TK: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """`X W~^T + bias`, `(T, N)` in the dtype of x."""

    def output_and_saved(
        self,
        x_TK: torch.Tensor,
        bias: torch.Tensor | None = None,
        save: bool = True,
        deferred: Deferred | None = None,
    ) -> tuple[torch.Tensor, SavedInput]:
        return self.output(x_TK, bias), (x_TK,) if save else ()

    def output_of_quantized(
        self,
        row: torch.Tensor,
        x_KT: torch.Tensor | None,
        tokens: int,
        x: Scale,
        bias: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        deferred: Deferred | None = None,
    ) -> tuple[torch.Tensor, SavedInput]:
        raise TypeError(f"{type(self).__name__} takes inputs in full: it has no input scale")

    def output_of_activated(
        self,
        projected_TF: torch.Tensor,
        activation: Activation,
        save: bool,
        bias: torch.Tensor | None = None,
        factors: Factors | None = None,
    ) -> tuple[torch.Tensor, SavedInput]:
        if factors is not None:  # whoever saves them saves the product as it is
            a, b, applied = factors
            projected_TF = rescale_(projected_TF.clone(), a, b, applied=applied)
        return self.output_and_saved(activated(projected_TF, activation), bias, save)

    def save_input(self, x_TK: torch.Tensor) -> SavedInput:
        return (x_TK,)

    def save_quantized(self, row: torch.Tensor) -> SavedInput:
        raise TypeError(f"{type(self).__name__} takes inputs in full: it has no input scale")

    def prepare_grad_output(
        self, dz_TN: torch.Tensor, seed: SeedLike, sums: torch.Tensor | None = None
    ) -> GradOutput:
        sum_over_tokens(dz_TN, sums)
        return GradOutput(dz_TN, seed)

    def prepare_activated_grad_output(
        self,
        dy_TF: torch.Tensor,
        projected_TF: torch.Tensor,
        activation: Activation,
        seed: SeedLike,
        sums: torch.Tensor | None = None,
        factors: tuple[Factors | None, Factors | None] = (None, None),
    ) -> GradOutput:
        of_dy, rest = factors
        dz_TN = activation_backward(dy_TF, projected_TF, activation, dy_factors=of_dy, factors=rest)
        return self.prepare_grad_output(dz_TN, seed, sums)


def with_bias(z_TN: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The sum, where no GEMM has added the bias."""
    return z_TN if bias is None else z_TN + bias


class AddsUp(Protocol):
    """What `weight_gradient` wants of GEMMs, of a linear or of experts."""

    total: GradientSum | None

    def grad_weight(self, operands: Any, saved: SavedInput) -> torch.Tensor:
        """See `LinearGemms`."""
        ...

    def grad_weight_to_scale(
        self, operands: Any, saved: SavedInput
    ) -> tuple[torch.Tensor, Factors | None]:
        """See `LinearGemms`."""
        ...


def weight_gradient(gemms: AddsUp, operands: Any, saved: SavedInput) -> torch.Tensor | None:
    """`grad_weight`; None where it has been added to the step's sum."""
    total = gemms.total
    if total is None or not total.step.open:
        return gemms.grad_weight(operands, saved)
    total.add(*gemms.grad_weight_to_scale(operands, saved))
    return None


def kept_in_place(buffer: torch.Tensor | None, value: torch.Tensor) -> torch.Tensor:
    """`value` in the buffer of the steps before, whose address stays; the first is the buffer."""
    return value if buffer is None else buffer.copy_(value)
