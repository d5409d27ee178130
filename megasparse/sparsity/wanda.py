"""Running mean squares of the input channels of a layer, for the Wanda metric.

Wanda (Sun et al., ICLR 2024) keeps the largest |w_ij| ||x_j||; of a row of W only the ratios of the
norms matter, so the root mean square over all tokens seen so far serves. What the micro-batches of
a step add waits until the step is done: it is summed over ranks then, so that all replicas have the
same figures after every step, and dropped with a skipped step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


class InputNorms:
    """Root mean squares of one layer's local input channels `(K,)`.

    Attributes:
        square: float64 sums of squares over `tokens` tokens; None before the first step.
    """

    def __init__(self) -> None:
        self.square: torch.Tensor | None = None
        self.tokens = 0
        # Sums of squares of the step under way, and tokens as the last entry; it stays where it
        # is, so that captured passes add to it.
        self._step: torch.Tensor | None = None

    @torch.no_grad()
    def observe(self, x: torch.Tensor) -> None:
        """Add the inputs `(..., K)` of a micro-batch to the current step."""
        flat = x.detach().reshape(-1, x.shape[-1])
        if self._step is None:
            self._step = flat.new_zeros(flat.shape[1] + 1, dtype=torch.float64)
        self._step[:-1] += flat.float().square().sum(0).double()
        self._step[-1] += flat.shape[0]

    def drop(self) -> None:
        """Forget the current step."""
        if self._step is not None:
            self._step.zero_()

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

    def _take_step(self) -> torch.Tensor | None:
        if self._step is None:
            return None
        taken = self._step.clone()
        self.drop()
        return taken

    def _add(self, square: torch.Tensor, tokens: int) -> None:
        self.square = square if self.square is None else self.square + square
        self.tokens += tokens


def finish_step(
    layers: Sequence[tuple[InputNorms, bool]],
    sum_over_replicas: Callable[[torch.Tensor], torch.Tensor],
    sum_over_tp: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """Add a finished step to the running figures, in one reduction for all layers.

    Args:
        layers: with whether a layer's inputs are split over the sequence, so that every
            tensor-parallel rank has seen other tokens.
        sum_over_replicas, sum_over_tp: in place; collective calls.
    """
    for split in (False, True):
        chosen = [one for one, is_split in layers if is_split == split]
        steps = [one._take_step() for one in chosen]
        seen = [(one, step) for one, step in zip(chosen, steps, strict=True) if step is not None]
        if not seen:
            continue
        flat = torch.cat([step for _, step in seen])
        flat = sum_over_replicas(sum_over_tp(flat) if split else flat)
        parts = flat.split([step.numel() for _, step in seen])
        counts = torch.stack([part[-1] for part in parts]).round().long().tolist()
        for (one, _), part, count in zip(seen, parts, counts, strict=True):
            if count:
                one._add(part[:-1].clone(), count)
