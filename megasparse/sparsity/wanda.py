"""Running mean squares of the input channels of a layer, for the Wanda metric.

Wanda (Sun et al., ICLR 2024) keeps the largest |w_ij| ||x_j||; of a row of W only the ratios of the
norms matter, so the root mean square over all tokens seen so far serves. What the micro-batches of
a step add waits until the step is done: it is summed over ranks then, so that all replicas have the
same figures after every step, and dropped with a skipped step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


class InputSquares:
    """Of one layer's local input channels `(K,)`.

    Attributes:
        square: float64 sums of squares over `tokens` tokens; None before the first step.
    """

    def __init__(self) -> None:
        self.square: torch.Tensor | None = None
        self.tokens = 0
        self._step_square: torch.Tensor | None = None
        self._step_tokens = 0

    @torch.no_grad()
    def observe(self, x: torch.Tensor) -> None:
        """Add the inputs `(..., K)` of a micro-batch to the current step."""
        flat = x.detach().reshape(-1, x.shape[-1])
        square = flat.float().square().sum(0).double()
        self._step_square = square if self._step_square is None else self._step_square + square
        self._step_tokens += flat.shape[0]

    def drop(self) -> None:
        """Forget the current step."""
        self._step_square, self._step_tokens = None, 0

    def scale(self, weight: torch.Tensor) -> torch.Tensor:
        """`|w_ij| rms(x_j)` with w's sign and dtype, float32 of 16-bit ones; w itself at first."""
        if self.square is None:
            return weight
        norms = (self.square / self.tokens).sqrt().float()
        return weight.float() * norms

    def export_state(self) -> dict[str, torch.Tensor]:
        """For a checkpoint."""
        if self.square is None:
            return {}
        return {"input_square": self.square, "input_tokens": torch.tensor(self.tokens)}

    def import_state(self, state: dict[str, torch.Tensor], device: torch.device) -> None:
        """Take over what `export_state` gave."""
        self.drop()
        self.square, self.tokens = None, 0
        if "input_square" in state:
            self.square = state["input_square"].to(device)
            self.tokens = int(state["input_tokens"])

    def _take_step(self) -> tuple[torch.Tensor, int] | None:
        if self._step_square is None:
            return None
        taken = self._step_square, self._step_tokens
        self.drop()
        return taken

    def _add(self, square: torch.Tensor, tokens: int) -> None:
        self.square = square if self.square is None else self.square + square
        self.tokens += tokens


def finish_step(
    layers: Sequence[tuple[InputSquares, bool]],
    sum_over_dp: Callable[[torch.Tensor], torch.Tensor],
    sum_over_tp: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """Add a finished step to the running figures, in one reduction for all layers.

    Args:
        layers: with whether a layer's inputs are split over the sequence, so that every
            tensor-parallel rank has seen other tokens.
        sum_over_dp, sum_over_tp: in place; collective calls.
    """
    for split in (False, True):
        chosen = [one for one, is_split in layers if is_split == split]
        steps = [one._take_step() for one in chosen]
        seen = [(one, step) for one, step in zip(chosen, steps, strict=True) if step is not None]
        if not seen:
            continue
        device = seen[0][1][0].device
        tokens = torch.tensor([count for _, (_, count) in seen], device=device).double()
        flat = torch.cat([square for _, (square, _) in seen] + [tokens])
        flat = sum_over_dp(sum_over_tp(flat) if split else flat)
        counts = flat[-len(seen) :].round().long().tolist()
        start = 0
        for (one, (square, _)), count in zip(seen, counts, strict=True):
            one._add(flat[start : start + square.numel()].clone(), count)
            start += square.numel()
