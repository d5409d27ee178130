"""Brings each sparse weight's masked decay to the tensors that the optimizer steps on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from megasparse.kernels import masked_decay_
from megasparse.optim.fragments import Fragment
from megasparse.sparsity.controller import SparsityController


class Piece(NamedTuple):
    """Consecutive entries of one of the optimizer's tensors.

    Attributes:
        start, length: in the flattened tensor.
        mask: bool, 1-D, of the entries; None: they are not decayed.
        decay: 0-d float32 at an address that stays: their lambda, in units of the optimizer's;
            None: it is the optimizer's.
    """

    start: int
    length: int
    mask: torch.Tensor | None
    decay: torch.Tensor | None = None


class MaskedDecay:
    """The decay of the current step, per fragment.

    Args:
        controller: knows masks, phase and lambda.
    """

    def __init__(self, controller: SparsityController) -> None:
        self._controller = controller
        self._by_tensor: dict[int, list[Fragment]] = {}
        self._by_parameter: dict[int, Fragment] = {}

    def attach(self, fragments: Sequence[Fragment]) -> None:
        """Say where the parameters lie; after the engine is built, since ZeRO makes its shards."""
        self._by_tensor = {}
        for fragment in fragments:
            self._by_tensor.setdefault(id(fragment.tensor), []).append(fragment)
        self._by_parameter = {id(fragment.parameter): fragment for fragment in fragments}

    def with_decay(self, parameter: torch.nn.Parameter, gradient: torch.Tensor) -> torch.Tensor:
        """`grad + lambda (1 - M) o W` in float32, for the norm that both are clipped by, in phases
        that clip them together.

        Args:
            parameter: of the model.
            gradient: of the piece of it that this rank's optimizer holds; it is left as it is. It
                may end in padding.

        Returns:
            1-D; the gradient itself where there is no mask or no decay.
        """
        strength, mask = self._controller.masked_decay(), self._masks().get(id(parameter))
        together = self._controller.span.recipe.masked_decay_before_clipping
        if strength == 0.0 or mask is None or not together:
            return gradient
        piece = self._by_parameter[id(parameter)]
        total = gradient.detach().reshape(-1).to(torch.float32, copy=True)
        masked_decay_(
            total.narrow(0, 0, piece.length),
            piece.of(piece.tensor.data),
            piece.of_parameter(mask),
            strength,
        )
        return total

    def fragments_of(self, tensor: torch.Tensor) -> list[Fragment]:
        """What one of the optimizer's tensors holds."""
        return self._by_tensor.get(id(tensor), [])

    def pieces(self, tensor: torch.Tensor) -> list[Piece]:
        """One of the optimizer's tensors in pieces, with the masks that they are decayed by."""
        masks, found, end = self._masks(), [], 0
        own = {id(weight): state.decay for state, weight in self._controller.weights}
        for fragment in sorted(self.fragments_of(tensor), key=lambda one: one.tensor_start):
            mask = masks.get(id(fragment.parameter))
            if mask is None:
                continue
            if fragment.tensor_start > end:
                found.append(Piece(end, fragment.tensor_start - end, None))
            kept = fragment.of_parameter(mask)
            decay = own[id(fragment.parameter)]
            value = None if decay is None else decay.value
            found.append(Piece(fragment.tensor_start, fragment.length, kept, value))
            end = fragment.tensor_start + fragment.length
        if tensor.numel() > end:
            found.append(Piece(end, tensor.numel() - end, None))
        return found

    def measure(self, optimizer: torch.optim.Optimizer, strength: float) -> None:
        """Tell the probes how strong the decay of this step is beside the gradients.

        Args:
            strength: lambda, in the units of the optimizer's gradients.
        """
        states = {id(weight): state for state, weight in self._controller.weights}
        if strength == 0.0:
            return
        for group in optimizer.param_groups:
            for tensor in group["params"]:
                for fragment in self.fragments_of(tensor):
                    state = states.get(id(fragment.parameter))
                    if state is None or state.mask is None or tensor.grad is None:
                        continue
                    weight = fragment.of(tensor.data)
                    if self._controller.recipe.regulariser == "masked_l1_decay":
                        weight = weight.sign()
                    masked = weight.masked_fill(fragment.of_parameter(state.mask), 0.0)
                    own = strength if state.decay is None else strength * state.decay.value.double()
                    state.probe.decay(fragment.of(tensor.grad), masked, own)

    def _masks(self) -> dict[int, torch.Tensor]:
        return {id(weight): mask for weight, mask in self._controller.masked_weights()}
