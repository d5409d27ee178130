"""Perplexity of a long sequence, in windows of the model's context.

A window is `length` tokens and the token that follows each; the next one begins `stride` tokens
later and scores only what the one before has not. So every token but the first is scored once, with
at least `length - stride` tokens before it (but at the start). With `stride == length` the windows
are the samples of a training run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megasparse.errors import ConfigError, DataError
from megasparse.megatron.grid import Grid
from megasparse.megatron.loss import masked_sum
from megasparse.progress import progress


@dataclass(frozen=True)
class Perplexity:
    """Of a set: mean loss in nats a token, and the tokens that it is the mean over."""

    loss: float
    tokens: int

    @property
    def value(self) -> float:
        return math.exp(min(self.loss, 700.0))


@dataclass(frozen=True)
class Window:
    """Inputs are tokens `[begin, begin + length)`; labels from token `scored_from` on count."""

    begin: int
    length: int
    scored_from: int


def windows(num_tokens: int, length: int, stride: int) -> list[Window]:
    """The windows of a sequence.

    Raises:
        ConfigError: a stride of 0, or longer than a window.
        DataError: fewer than two tokens.
    """
    if not 1 <= stride <= length:
        raise ConfigError(f"stride {stride}, expected 1 to the window of {length} tokens")
    if num_tokens < 2:
        raise DataError(f"{num_tokens} tokens, expected at least 2")
    found: list[Window] = []
    scored_to = 1  # the first token has nothing before it
    begin = 0
    while scored_to < num_tokens:
        size = min(length, num_tokens - 1 - begin)
        found.append(Window(begin, size, scored_to))
        scored_to = begin + size + 1
        begin += stride
    return found


@torch.no_grad()
def perplexity(
    model: torch.nn.Module,
    grid: Grid,
    tokens: np.ndarray,
    length: int,
    stride: int,
    batch_size: int = 1,
    bar: bool = False,
) -> Perplexity:
    """Perplexity of `tokens` `(N,)`; every rank of the grid takes part, copies share the windows.

    Args:
        model: whole; gives losses `(B, S)` of tokens, positions, None and labels.
        bar: show a progress bar.
    """
    batches = _batches(windows(len(tokens), length, stride), batch_size)
    total = torch.zeros(2, dtype=torch.float64, device=grid.device)
    mine = batches[grid.dp_rank :: grid.dp_size]
    for batch in progress(mine, desc="evaluating", unit="batch", enabled=bar):
        inputs, labels, counted = _tensors(tokens, batch, grid.device)
        positions = torch.arange(inputs.shape[1], device=grid.device).expand_as(inputs)
        losses = model(inputs, positions, None, labels=labels).double()
        here, count = masked_sum(losses, counted)
        total[0] += here
        total[1] += count
    total = grid.sum_over_dp_cp(total)
    return Perplexity(float(total[0] / total[1]), round(float(total[1])))


def _batches(found: Sequence[Window], size: int) -> list[list[Window]]:
    """Windows of equal length side by side (only the last ones are shorter)."""
    batches: list[list[Window]] = []
    for window in found:
        if not batches or len(batches[-1]) == size or batches[-1][0].length != window.length:
            batches.append([])
        batches[-1].append(window)
    return batches


def _tensors(
    tokens: np.ndarray, batch: Sequence[Window], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, counted = [], []
    for window in batch:
        piece = tokens[window.begin : window.begin + window.length + 1]
        rows.append(torch.from_numpy(piece.astype(np.int64)))
        places = torch.arange(window.begin + 1, window.begin + window.length + 1)
        counted.append(places >= window.scored_from)
    whole = torch.stack(rows).to(device)
    return whole[:, :-1], whole[:, 1:].contiguous(), torch.stack(counted).to(device)
