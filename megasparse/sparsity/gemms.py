"""The three GEMMs of a linear layer, as a protocol and its plain-torch implementations.

`x_TK` are tokens by inputs, `dz_TN` tokens by outputs, weights `(N, K)`; everything is local to a
rank. Communication is around these (`sparsity/linear.py`), never inside.

    output       z_TN  = x_TK  @ w_NK^T     contraction over K
    grad_input   dx_TK = dz_TN @ w_NK       contraction over N
    grad_weight  dw_NK = dz_TN^T @ x_TK     contraction over T

Two of them share x and two share dz. What an implementation makes of either for its GEMMs (an FP8
copy, a packed draw) it makes once: `output_keeping` gives what grad_weight wants of x beside z, and
`gradient` what both GEMMs of the backward pass want of dz.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Set
from typing import Any, NamedTuple, Protocol

import torch

from megasparse.kernels import mvue24
from megasparse.sparsity.probe import Probe
from megasparse.sparsity.recipe import Mvue
from megasparse.sparsity.shard import Section

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


class DenseGemms(PlainOperands):
    """All three GEMMs dense."""

    halved: Set[str] = frozenset()

    def __init__(self, w_NK: torch.Tensor) -> None:
        self._w_NK = w_NK.detach()

    def output(self, x_TK: torch.Tensor) -> torch.Tensor:
        return x_TK @ self._w_NK.t()

    def grad_input(self, gradient: Gradient) -> torch.Tensor:
        return gradient.dz_TN @ self._w_NK

    def grad_weight(self, gradient: Gradient, kept: Kept) -> torch.Tensor:
        return gradient.dz_TN.t() @ kept[0]


class ReferenceSparseGemms(DenseGemms):
    """2:4 GEMMs computed densely on pruned operands: what the hardware computes, on any device.

    Args:
        effective_NK: W~, 2:4 along K (and along N for a transposable mask).
        mvue: how dZ^T is pruned along tokens.
        channels: where the local output channels lie in the whole layer, so that every
            tensor-parallel degree draws the same random numbers.
        probe: is told what is drawn and rounded.
    """

    def __init__(
        self,
        effective_NK: torch.Tensor,
        mvue: Mvue,
        channels: tuple[Section, ...],
        probe: Probe | None = None,
    ) -> None:
        super().__init__(effective_NK)
        self._mvue = mvue
        self._channels = channels
        self._probe = probe or Probe()

    def grad_weight(self, gradient: Gradient, kept: Kept) -> torch.Tensor:
        return self._drawn(gradient).t() @ kept[0]

    def _drawn(self, gradient: Gradient) -> torch.Tensor:
        if self._mvue == "off":
            return gradient.dz_TN
        return self._prune_along_tokens(*gradient)

    def _prune_along_tokens(self, dz_TN: torch.Tensor, seed: int) -> torch.Tensor:
        with self._probe.timer.span("preparation"):
            parts = [
                mvue24(
                    dz_TN.narrow(1, s.local_start, s.length),
                    seed=seed,
                    dim=0,
                    offsets=(0, s.global_start),
                    exact=self._mvue == "exact",
                )
                for s in self._channels
            ]
            pruned = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        self._probe.mvue(dz_TN, pruned)
        return pruned


class SimulatedFp8Gemms(ReferenceSparseGemms):
    """S-STE's FP8 (section 2.6), simulated: operands rounded to FP8, GEMMs in higher precision.

    | GEMM        | operands                             |
    |-------------|--------------------------------------|
    | output      | X e4m3, W~ e4m3                      |
    | grad_input  | dZ e5m2, W~ e5m2                     |
    | grad_weight | MVUE(dZ^T) e5m2, X e5m2              |

    Scales are per tensor and of the moment: 448 (e4m3) or 57344 (e5m2) over the largest magnitude,
    which for dZ is taken after MVUE has amplified the entries it keeps.

    Args:
        reduce_max: largest value over the ranks that share the layer, so that a shard is rounded as
            the whole is.
    """

    def __init__(
        self,
        effective_NK: torch.Tensor,
        mvue: Mvue,
        channels: tuple[Section, ...],
        reduce_max: Callable[[torch.Tensor], torch.Tensor] | None = None,
        probe: Probe | None = None,
    ) -> None:
        super().__init__(effective_NK, mvue, channels, probe)
        self._reduce_max = reduce_max

    def output(self, x_TK: torch.Tensor) -> torch.Tensor:
        return self._e4m3(x_TK, "x") @ self._e4m3(self._w_NK, "weight").t()

    def grad_input(self, gradient: Gradient) -> torch.Tensor:
        return self._e5m2(gradient.dz_TN, "grad_output") @ self._e5m2(self._w_NK)

    def grad_weight(self, gradient: Gradient, kept: Kept) -> torch.Tensor:
        drawn = self._e5m2(self._drawn(gradient), "grad_output_mvue")
        return drawn.t() @ self._e5m2(kept[0])

    def _e4m3(self, tensor: torch.Tensor, operand: str | None = None) -> torch.Tensor:
        return self._round(tensor, torch.float8_e4m3fn, operand)

    def _e5m2(self, tensor: torch.Tensor, operand: str | None = None) -> torch.Tensor:
        return self._round(tensor, torch.float8_e5m2, operand)

    def _round(self, tensor: torch.Tensor, dtype: torch.dtype, operand: str | None) -> torch.Tensor:
        """Rounded; an operand with a name is told to the probe."""
        with self._probe.timer.span("preparation"):
            scale = fp8_scale(tensor, dtype, self._reduce_max)
            rounded = (tensor.float() * scale).to(dtype).float()
            if operand is not None:
                self._probe.fp8(operand, tensor, rounded, dtype)
            return (rounded / scale).to(tensor.dtype)


class Fp8StoredGemms(PlainOperands):
    """A frozen weight kept in e4m3 with a scale a row: half the memory of 16 bits.

    It is brought back to the input's precision where it is used, so the GEMM is a dense one; there
    is no gradient to compute.

    Args:
        w_NK: the weight, which is not kept.
    """

    halved: Set[str] = frozenset()

    def __init__(self, w_NK: torch.Tensor) -> None:
        w = w_NK.detach().float()
        largest = torch.finfo(torch.float8_e4m3fn).max
        self._scale_N = (w.abs().amax(1) / largest).clamp(min=torch.finfo(w.dtype).tiny)
        self._codes_NK = (w / self._scale_N[:, None]).to(torch.float8_e4m3fn)

    @property
    def bytes_here(self) -> int:
        """Memory of codes and scales."""
        return self._codes_NK.numel() + 4 * self._scale_N.numel()

    def output(self, x_TK: torch.Tensor) -> torch.Tensor:
        return (x_TK @ self._codes_NK.to(x_TK.dtype).t()) * self._scale_N.to(x_TK.dtype)

    def grad_input(self, gradient: Gradient) -> torch.Tensor:
        raise RuntimeError("a frozen weight has no backward pass")

    def grad_weight(self, gradient: Gradient, kept: Kept) -> torch.Tensor:
        raise RuntimeError("a frozen weight has no backward pass")


def round_to_fp8(
    tensor: torch.Tensor,
    dtype: torch.dtype,
    reduce_max: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """`tensor` with its values rounded to FP8 under one scale; shape and dtype stay.

    `s = max(dtype) / amax`, `q = cast(x * s)`, result `q / s`. A zero tensor comes back unchanged;
    zeros stay zeros, so 2:4 stays 2:4; infinities and NaN become NaN.
    """
    scale = fp8_scale(tensor, dtype, reduce_max)
    rounded = (tensor.float() * scale).to(dtype).float()
    return (rounded / scale).to(tensor.dtype)


def fp8_scale(
    tensor: torch.Tensor,
    dtype: torch.dtype,
    reduce_max: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """float32 0-d: `max(dtype) / amax`, 1 for a tensor of zeros."""
    amax = tensor.detach().abs().amax().float()
    if reduce_max is not None:
        amax = reduce_max(amax)
    return torch.where(amax > 0, torch.finfo(dtype).max / amax, torch.ones_like(amax))
