"""The three GEMMs in plain torch: dense, and 2:4 computed densely, which any device can."""

from __future__ import annotations

from collections.abc import Set

import torch

from megasparse.kernels import mvue24
from megasparse.sparsity.gemms.protocol import Gradient, Kept, PlainOperands
from megasparse.sparsity.probe import Probe
from megasparse.sparsity.recipe import Mvue
from megasparse.sparsity.shard import Section


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
