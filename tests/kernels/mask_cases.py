"""Inputs that mask kernels get wrong, and bit-for-bit comparison; shared by the tests beside it."""

from __future__ import annotations

import pytest
import torch

WIDE = (torch.float32, torch.bfloat16, torch.float16)
WEIGHTS = (*WIDE, torch.float8_e4m3fn)
BACKENDS = ("reference", "triton")
# Fewer entries than one program, tails, sizes that are multiples of 4 only, several programs.
SHAPES = ((4, 4), (8, 20), (36, 132), (132, 508), (4, 17000))


def weights(name: str, shape: tuple[int, int], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """On CPU. "normal"; "ties": few distinct values, both zeros; "extreme": subnormals to inf."""
    generator = torch.Generator().manual_seed(seed)
    if name == "normal":
        w = torch.randn(shape, generator=generator)
    elif name == "ties":
        w = torch.randint(-2, 3, shape, generator=generator).float()
        w = torch.where(torch.rand(shape, generator=generator) < 0.1, -0.0 * w.abs(), w)
    else:
        finite = torch.finfo(dtype)
        values = [0.0, -0.0, finite.smallest_normal / 2, -finite.smallest_normal, 1.0, -finite.max]
        if dtype != torch.float8_e4m3fn:  # E4M3 has no infinity
            values += [float("inf"), float("-inf")]
        picks = torch.randint(0, len(values), shape, generator=generator)
        w = torch.tensor(values)[picks]
    return w.to(dtype)


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Shape, dtype and every byte."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    actual, expected = actual.detach().cpu().contiguous(), expected.detach().cpu().contiguous()
    different = (actual.view(torch.uint8) != expected.view(torch.uint8)).sum()
    assert different == 0, f"{different} of {expected.numel()} bytes differ"


def poison_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.empty` gives memory full of ones: NaN in every float type, no valid bool."""
    empty = torch.empty

    def poisoned(*args: object, **kwargs: object) -> torch.Tensor:
        tensor = empty(*args, **kwargs)  # type: ignore[call-overload]
        tensor.view(-1).view(torch.uint8).fill_(255)
        return tensor

    monkeypatch.setattr(torch, "empty", poisoned)
