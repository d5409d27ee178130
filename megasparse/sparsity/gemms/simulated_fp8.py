"""FP8 simulated in higher precision, as in S-STE's paper; for comparisons, on any device."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megasparse.sparsity.gemms.dense import ReferenceSparseGemms
from megasparse.sparsity.gemms.protocol import Deferred, GradOutput, SavedInput, with_bias
from megasparse.sparsity.probe import Probe
from megasparse.sparsity.recipe import SparsityRecipe
from megasparse.sparsity.shard import ALL_TOKENS, ShardSlice, TokenShare


class SimulatedFp8Gemms(ReferenceSparseGemms):
    """S-STE's FP8 (section 2.6), simulated: operands rounded to FP8, GEMMs in higher precision.

    | GEMM        | operands                             |
    |-------------|--------------------------------------|
    | output      | X e4m3, W~ e4m3                      |
    | grad_input  | dZ e5m2, W~ e5m2                     |
    | grad_weight | MVUE(dZ^T) e5m2, X e5m2              |

    Scales are per tensor and of the moment: 448 (e4m3) or 57344 (e5m2) over the largest magnitude,
    which for dZ is taken after MVUE has amplified the entries it keeps. A double-pruned W~ has
    its largest entry still, and so its scale.

    Args:
        reduce_max: largest value over the ranks that share the layer, so that a shard is rounded as
            the whole is.
    """

    def __init__(
        self,
        recipe: SparsityRecipe,
        channels: tuple[ShardSlice, ...],
        reduce_max: Callable[[torch.Tensor], torch.Tensor] | None = None,
        probe: Probe | None = None,
        tokens: TokenShare = ALL_TOKENS,
    ) -> None:
        super().__init__(recipe, channels, probe, tokens)
        self._reduce_max = reduce_max

    def output(self, x_TK: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return with_bias(self._e4m3(x_TK, "x") @ self._e4m3(self._w_NK, "weight").t(), bias)

    def grad_input(self, operands: GradOutput, deferred: Deferred | None = None) -> torch.Tensor:
        return self._e5m2(operands.dz_TN, "grad_output") @ self._e5m2(self._of_grad_input)

    def grad_weight(self, operands: GradOutput, saved: SavedInput) -> torch.Tensor:
        drawn = self._e5m2(self._drawn(operands), "grad_output_mvue")
        return drawn.t() @ self._e5m2(saved[0])

    def _e4m3(self, tensor: torch.Tensor, operand: str | None = None) -> torch.Tensor:
        return self._round(tensor, torch.float8_e4m3fn, operand)

    def _e5m2(self, tensor: torch.Tensor, operand: str | None = None) -> torch.Tensor:
        return self._round(tensor, torch.float8_e5m2, operand)

    def _round(self, tensor: torch.Tensor, dtype: torch.dtype, operand: str | None) -> torch.Tensor:
        """Rounded; an operand with a name is told to the probe."""
        with self._probe.timer.span("preparation"):
            scale = fp8_scale(tensor, dtype, self._reduce_max)
            rounded = (tensor.float() * scale).to(dtype)
            if operand is not None:
                self._probe.fp8(operand, tensor, rounded)
            return (rounded.float() / scale).to(tensor.dtype)


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
