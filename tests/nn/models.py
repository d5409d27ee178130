"""A small residual model of plain torch, and a few steps of training it."""

from __future__ import annotations

from collections.abc import Callable

import torch

WIDTH, HIDDEN = 16, 32


class Block(torch.nn.Module):
    """x + fc2(gelu(fc1(x)))."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.mlp = torch.nn.Module()
        self.mlp.linear_fc1 = torch.nn.Linear(WIDTH, HIDDEN, bias=bias)
        self.mlp.linear_fc2 = torch.nn.Linear(HIDDEN, WIDTH, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp.linear_fc2(
            torch.nn.functional.gelu(self.mlp.linear_fc1(x), approximate="tanh")
        )


class Model(torch.nn.Module):
    """Two blocks and a head."""

    def __init__(self, seed: int = 3, wrap: Callable | None = None) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = torch.nn.ModuleList(Block() for _ in range(2))
        self.head = torch.nn.Linear(WIDTH, WIDTH)
        self.wrap = wrap or (lambda block, x: block(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.layers:
            x = self.wrap(block, x)
        return self.head(x)


def micro_batch(step: int, number: int, tokens: int = 12) -> torch.Tensor:
    """Tokens of one micro-batch, (tokens, WIDTH)."""
    return torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(97 * step + number))


def loss_of(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Squared error of predicting the sorted input."""
    return (model(x).float() - x.sort(-1).values).square().mean()


def train(
    model: torch.nn.Module,
    step: Callable[[], object],
    steps: range,
    micro_batches: int = 2,
    data: Callable[[int, int], torch.Tensor] = micro_batch,
) -> list[float]:
    """Losses of some steps; `step` updates and zeroes."""
    losses = []
    for number in steps:
        total = 0.0
        for n in range(micro_batches):
            loss = loss_of(model, data(number, n)) / micro_batches
            loss.backward()
            total += loss.item()
        step()
        losses.append(total)
    return losses


def stepper(model: torch.nn.Module, optimizer: torch.optim.Optimizer, clip: float = 1.0):
    """Clip, step, zero."""

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()

    return step
