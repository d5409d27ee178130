"""Brings each sparse weight's masked decay to the tensors that the optimizer steps on."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megasparse.kernels import masked_decay_
from megasparse.optim.fragments import Fragment
from megasparse.sparsity.controller import SparsityController


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
        """`grad + lambda (1 - M) o W` in float32, for the norm that both are clipped by.

        Args:
            parameter: of the model.
            gradient: of the piece of it that this rank's optimizer holds; it is left as it is. It
                may end in padding.

        Returns:
            1-D; the gradient itself where there is no mask or no decay.
        """
        strength, mask = self._controller.masked_decay(), self._masks().get(id(parameter))
        if strength == 0.0 or mask is None:
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

    def add_to_gradients(self, optimizer: torch.optim.Optimizer, factor: float = 1.0) -> None:
        """`grad += factor lambda (1 - M) o W` for every masked piece of the optimizer's tensors.

        Args:
            factor: that the gradients were clipped by, if the decay is to be clipped with them.
        """
        strength = factor * self._controller.masked_decay()
        if strength == 0.0:
            return
        masks = self._masks()
        for group in optimizer.param_groups:
            for tensor in group["params"]:
                for fragment in self._by_tensor.get(id(tensor), []):
                    mask = masks.get(id(fragment.parameter))
                    if mask is not None and tensor.grad is not None:
                        masked_decay_(
                            fragment.of(tensor.grad),
                            fragment.of(tensor.data),
                            fragment.of_parameter(mask),
                            strength,
                        )

    def term(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """`lambda (1 - M) o W` in the shape of one of the optimizer's tensors, or None."""
        strength, masks = self._controller.masked_decay(), self._masks()
        pieces = [f for f in self._by_tensor.get(id(tensor), []) if id(f.parameter) in masks]
        if not pieces:
            return None
        decay = torch.zeros_like(tensor)
        for fragment in pieces:
            masked_decay_(
                fragment.of(decay),
                fragment.of(tensor.data),
                fragment.of_parameter(masks[id(fragment.parameter)]),
                strength,
            )
        return decay

    def measure(self, optimizer: torch.optim.Optimizer, factor: float = 1.0) -> None:
        """Tell the probes how strong the decay of this step is beside the gradients."""
        strength = factor * self._controller.masked_decay()
        states = {id(weight): state for state, weight in self._controller.weights}
        if strength == 0.0:
            return
        for group in optimizer.param_groups:
            for tensor in group["params"]:
                for fragment in self._by_tensor.get(id(tensor), []):
                    state = states.get(id(fragment.parameter))
                    if state is None or state.mask is None or tensor.grad is None:
                        continue
                    weight = fragment.of(tensor.data)
                    masked = weight.masked_fill(fragment.of_parameter(state.mask), 0.0)
                    state.probe.decay(fragment.of(tensor.grad), masked, strength)

    def _masks(self) -> dict[int, torch.Tensor]:
        return {id(weight): mask for weight, mask in self._controller.masked_weights()}
