"""A mask replaced in place: what was there is kept, flips are counted."""

from __future__ import annotations

import pytest
import torch

from megasparse.errors import KernelError
from megasparse.kernels.mask_update import replace_mask_
from megasparse.kernels.patterns import unpack_fours
from tests.kernels.mask_cases import BACKENDS


def _random(shape: tuple[int, int], seed: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_old_mask_is_kept_and_flips_are_counted(backend: str, device: torch.device) -> None:
    for seed, shape in enumerate(((4, 4), (0, 8), (33, 12), (36, 500), (129, 1028))):
        old, new = _random(shape, seed), _random(shape, seed + 50)
        mask, before = old.clone().to(device), torch.full((shape[0], shape[1] // 4), 77).byte()
        before = before.to(device)
        flips = replace_mask_(mask, new.to(device), before, backend=backend)
        assert flips.dtype == torch.int64 and flips.shape == ()
        assert flips.item() == sum(a != b for a, b in zip(old.flatten(), new.flatten()))
        assert torch.equal(mask.cpu(), new)
        assert torch.equal(unpack_fours(before.cpu()), old)
        assert replace_mask_(mask, new.to(device), before, backend=backend).item() == 0
        assert torch.equal(unpack_fours(before.cpu()), new)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mask_that_starts_at_an_odd_address(backend: str, device: torch.device) -> None:
    held = torch.ones(1 + 8 * 12, dtype=torch.bool, device=device)
    mask, new = held[1:].view(8, 12), _random((8, 12), 1).to(device)
    before = torch.zeros(8, 3, dtype=torch.uint8, device=device)
    flips = replace_mask_(mask, new, before, backend=backend)
    assert flips.item() == (~new).sum().item() and torch.equal(held[1:].view(8, 12), new)
    assert bool(held[0]) and bool((before == 15).all())


def test_wrong_arguments_are_named(device: torch.device) -> None:
    mask, new = (_random((8, 8), seed).to(device) for seed in (1, 2))
    before = torch.zeros(8, 2, dtype=torch.uint8, device=device)
    for arguments, text in (
        ((mask.int(), new, before), "mask is torch.int32"),
        ((mask, new[:4], before), r"new is torch.bool \(4, 8\)"),
        ((mask, new.t(), before), "new is .* expected contiguous"),
        ((mask, new, before.int()), "before is torch.int32"),
        ((mask[:, :6].contiguous(), new[:, :6].contiguous(), before[:, :1]), "before is|multiple"),
    ):
        with pytest.raises(KernelError, match=text):
            replace_mask_(*arguments)
