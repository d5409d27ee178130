"""The GEMMs of a layer under names that a profiler shows: LAYER output, grad_input, grad_weight."""

from __future__ import annotations

from typing import Any, cast

import torch

from megasparse.kernels.factors import Factors
from megasparse.sparsity.gemms.protocol import LinearGemms, SavedInput
from megasparse.timer import named


class NamedGemms:
    """Another's GEMMs, each in a range of its own.

    Args:
        gemms: that compute; everything that has no range here is theirs.
        layer: the linear's name in the model.
    """

    def __init__(self, gemms: LinearGemms, layer: str) -> None:
        self._gemms, self._layer = gemms, layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._gemms, name)

    def output(self, *operands: Any) -> torch.Tensor:
        with named(f"{self._layer} output"):
            return self._gemms.output(*operands)

    def output_and_saved(self, *operands: Any, **options: Any) -> tuple[torch.Tensor, SavedInput]:
        with named(f"{self._layer} output"):
            return self._gemms.output_and_saved(*operands, **options)

    def output_of_quantized(
        self, *operands: Any, **options: Any
    ) -> tuple[torch.Tensor, SavedInput]:
        with named(f"{self._layer} output"):
            return self._gemms.output_of_quantized(*operands, **options)

    def output_of_activated(self, *operands: Any) -> Any:
        with named(f"{self._layer} output"):
            return self._gemms.output_of_activated(*operands)

    def prepare_grad_output(self, *operands: Any) -> Any:
        with named(f"{self._layer} preparation of grad_output"):
            return self._gemms.prepare_grad_output(*operands)

    def prepare_activated_grad_output(self, *operands: Any) -> Any:
        with named(f"{self._layer} preparation of grad_output"):
            return self._gemms.prepare_activated_grad_output(*operands)

    def grad_input(self, *operands: Any) -> torch.Tensor:
        with named(f"{self._layer} grad_input"):
            return self._gemms.grad_input(*operands)

    def grad_weight(self, operands: Any, saved: SavedInput) -> torch.Tensor:
        with named(f"{self._layer} grad_weight"):
            return self._gemms.grad_weight(operands, saved)

    def grad_weight_to_scale(
        self, operands: Any, saved: SavedInput
    ) -> tuple[torch.Tensor, Factors | None]:
        with named(f"{self._layer} grad_weight"):
            return self._gemms.grad_weight_to_scale(operands, saved)


def under_name(gemms: LinearGemms, layer: str | None) -> LinearGemms:
    """The GEMMs with the layer's name, if it has one."""
    return gemms if layer is None else cast(LinearGemms, NamedGemms(gemms, layer))
