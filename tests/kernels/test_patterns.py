"""The pattern lists and masks stored as indices."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from megasparse.errors import KernelError
from megasparse.kernels import (
    decode_patterns,
    encode_patterns,
    prune24_mask,
    transposable24_mask,
    transposable_patterns,
)
from megasparse.kernels.patterns import pack_fours, unpack_fours


def brute_force_patterns() -> list[tuple[int, ...]]:
    """All 4x4 0/1 matrices with two ones a row and a column, as 16 bits, descending."""
    found = []
    for bits in product((1, 0), repeat=16):
        block = np.array(bits).reshape(4, 4)
        if (block.sum(0) == 2).all() and (block.sum(1) == 2).all():
            found.append(bits)
    return sorted(found, reverse=True)


def test_the_90_patterns_in_order() -> None:
    expected = brute_force_patterns()
    patterns = transposable_patterns()
    assert patterns.shape == (90, 4, 4)
    assert patterns.dtype == torch.bool
    assert [tuple(p) for p in patterns.view(90, 16).int().tolist()] == expected
    assert patterns[0].int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]


def test_encoding_names_the_pattern_of_each_block() -> None:
    patterns = transposable_patterns()
    picks = torch.randint(0, 90, (5, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.cat([torch.cat(list(patterns[row]), dim=1) for row in picks])
    indices = encode_patterns(mask, transposable=True)
    assert indices.dtype == torch.uint8
    assert torch.equal(indices, picks.to(torch.uint8))


def test_row_wise_indices_count_down_from_1100() -> None:
    rows = ["1100", "1010", "1001", "0110", "0101", "0011"]
    mask = torch.tensor([[bit == "1" for bit in row] for row in rows])
    assert encode_patterns(mask, transposable=False).flatten().tolist() == list(range(6))


@pytest.mark.parametrize("shape", [(4, 4), (24, 12), (0, 8), (128, 260)])
@pytest.mark.parametrize("transposable", [True, False])
def test_round_trip(shape: tuple[int, int], transposable: bool, device: torch.device) -> None:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(device)
    mask = (transposable24_mask if transposable else prune24_mask)(w)
    indices = encode_patterns(mask, transposable)
    assert indices.numel() * (16 if transposable else 4) == mask.numel()
    assert torch.equal(decode_patterns(indices, shape, transposable), mask)
    column_major = mask.t().contiguous().t()
    assert torch.equal(encode_patterns(column_major, transposable), indices)


def test_any_number_of_rows_row_wise() -> None:
    mask = prune24_mask(torch.randn(5, 8))
    assert torch.equal(decode_patterns(encode_patterns(mask, False), mask.shape, False), mask)


@pytest.mark.parametrize("transposable", [True, False])
def test_masks_that_are_no_pattern_are_refused(transposable: bool) -> None:
    mask = transposable24_mask(torch.randn(8, 8))
    broken = mask.clone()
    broken[5, 6] = ~broken[5, 6]
    with pytest.raises(KernelError, match=r"\(1, 1\)" if transposable else r"\(5, 1\)"):
        encode_patterns(broken, transposable)
    rows_only = torch.tensor([[True, True, False, False]] * 4)
    with pytest.raises(KernelError, match="none of the 90"):
        encode_patterns(rows_only, transposable=True)
    with pytest.raises(KernelError, match="int32"):
        encode_patterns(mask.int(), transposable)
    with pytest.raises(KernelError, match=r"\(8, 6\)"):
        encode_patterns(mask[:, :6], transposable)


def test_indices_that_do_not_fit_are_refused() -> None:
    indices = encode_patterns(transposable24_mask(torch.randn(8, 8)), transposable=True)
    with pytest.raises(KernelError, match=r"\(2, 2\).*\(3, 2\)"):
        decode_patterns(indices, (12, 8), transposable=True)
    with pytest.raises(KernelError, match="int64"):
        decode_patterns(indices.long(), (8, 8), transposable=True)
    with pytest.raises(KernelError, match="90"):
        decode_patterns(torch.full_like(indices, 90), (8, 8), transposable=True)
    with pytest.raises(KernelError, match="6"):
        decode_patterns(torch.full((8, 2), 6, dtype=torch.uint8), (8, 8), transposable=False)


@pytest.mark.parametrize("shape", [(1, 4), (5, 12), (64, 128)])
def test_four_entries_a_byte_and_back(device, shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(device) < 0.4
    packed = pack_fours(mask)
    assert packed.dtype == torch.uint8 and packed.shape == (shape[0], shape[1] // 4)
    assert packed[0, 0] == sum(int(mask[0, i]) << i for i in range(4))
    assert torch.equal(unpack_fours(packed), mask)
