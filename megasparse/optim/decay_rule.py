"""A masked decay that needs no search: lambda of each weight follows from its own moments.

The decay adds `lambda w` to the gradient of a masked weight, and AdamW divides by `sqrt(v)`. So
their ratio decides, `rho = lambda mean|w| / mean sqrt(v)` over the masked entries of a tensor. In
runs whose lambda was found by search rho lay between 0.03 and 0.08 throughout, while lambda itself
depends on the size of the model, the batch and the learning rate. Here rho is given:

    lambda <- rho mean sqrt(v / (1 - b2^t)) / mean|w|     every `masked_decay_update_interval` steps

and from one refresh to the next it at most doubles or halves. A refresh is computed on the device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from megasparse.optim.masked_decay import MaskedDecay
from megasparse.sparsity import schedule
from megasparse.sparsity.controller import SparsityController
from megasparse.sparsity.own_decay import OwnDecay

# The most by which lambda changes at a refresh, but for the first.
MOST = 2.0


class DecayRule:
    """Keeps the `OwnDecay` of all weights of a rank.

    Args:
        controller: knows the weights, the recipe and the step.
        decay: knows where the weights lie in the optimizer's tensors.
        optimizer: AdamW, with the moments.
        add_up: sums float64 over the ranks that hold pieces of the same weights, in place.
    """

    def __init__(
        self,
        controller: SparsityController,
        decay: MaskedDecay,
        optimizer: torch.optim.Optimizer,
        add_up: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        self._controller, self._decay, self._optimizer = controller, decay, optimizer
        self._add_up = add_up
        for state, weight in controller.weights:
            state.decay = OwnDecay(weight.device)

    @torch.no_grad()
    def follow(self) -> None:
        """After a step: lambda of the next one, if it is due; a collective call then."""
        controller = self._controller
        if not controller.weights or not self._is_due():
            return
        self._refresh()
        controller.mean_decay = None  # it is asked for anew
        # As long as it is 0 every update so far was skipped, and it stays due.
        if controller.masked_decay():
            for decay in self._decays():
                decay.step = controller.clock.step

    def _is_due(self) -> bool:
        """On multiples of the interval, and as soon as there are masks and moments."""
        controller = self._controller
        recipe, step = controller.recipe, controller.clock.step
        spans = schedule.spans(recipe, controller.clock.train_iters)
        first = next((span.steps.start for span in spans if span.recipe.is_sparse), step)
        if controller.span.recipe.regulariser == "none" or step <= first:
            return False
        before, interval = self._decays()[0].step, recipe.masked_decay_update_interval
        return before < 0 or step // interval > before // interval

    def _refresh(self) -> None:
        decays = [decay.value for decay in self._decays()]
        roots, sizes = self._add_up(self._sums()).unbind(1)
        known = torch.stack(decays).double()
        rho = self._controller.recipe.masked_decay_rho
        assert rho is not None
        wanted = rho * roots / sizes
        limited = torch.minimum(torch.maximum(wanted, known / MOST), known * MOST)
        new = torch.where(known > 0, limited, wanted)
        # Without moments, or without masked weights, there is nothing to follow.
        new = torch.where(torch.isfinite(wanted) & (wanted > 0), new, known)
        for decay, value in zip(decays, new.float(), strict=True):
            decay.copy_(value)

    def _decays(self) -> list[OwnDecay]:
        return [s.decay for s, _ in self._controller.weights if s.decay is not None]

    def _sums(self) -> torch.Tensor:
        """float64 (weights, 2): of this rank's masked entries, sqrt(v / (1 - b2^t)) and |w|."""
        weights = self._controller.weights
        place = {id(weight): i for i, (_, weight) in enumerate(weights)}
        sums = torch.zeros(len(weights), 2, dtype=torch.float64, device=weights[0][1].device)
        for group in self._optimizer.param_groups:
            for tensor in group["params"]:
                moments = self._optimizer.state.get(tensor) or {}
                for fragment in self._decay.fragments_of(tensor) if moments else ():
                    i = place.get(id(fragment.parameter))
                    mask = None if i is None else weights[i][0].mask
                    if i is None or mask is None:
                        continue
                    kept = fragment.of_parameter(mask)
                    v = fragment.of(moments["exp_avg_sq"]).masked_fill(kept, 0.0)
                    size = fragment.of(tensor.detach()).masked_fill(kept, 0.0).abs()
                    corrected = 1 - group["betas"][1] ** float(moments["step"])
                    root = v.sqrt().sum(dtype=torch.float64) / corrected**0.5
                    sums[i] += torch.stack([root, size.sum(dtype=torch.float64)])
        return sums
