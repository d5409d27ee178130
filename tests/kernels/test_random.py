"""Philox against published vectors and a scalar implementation; seeds."""

from __future__ import annotations

import pytest
import torch

from megasparse.errors import KernelError
from megasparse.kernels import derive_seed
from megasparse.kernels.random import check_seed, philox2x32, uniform24


def scalar_philox(counter0: int, counter1: int, key: int) -> tuple[int, int]:
    """Philox2x32-7 on Python's unbounded integers."""
    for _ in range(7):
        product = 0xD256D193 * counter0
        counter0, counter1 = (product >> 32) ^ key ^ counter1, product % 2**32
        key = (key + 0x9E3779B9) % 2**32
    return counter0, counter1


# The known-answer vectors that Random123 publishes for philox2x32 with 7 rounds.
KNOWN = [
    ((0, 0, 0), (0x257A3673, 0xCD26BE2A)),
    ((0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF), (0xAB302C4D, 0x3DC9D239)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E), (0xBEDBBE6B, 0xE4C770B3)),
]


@pytest.mark.parametrize("arguments, expected", KNOWN)
def test_known_answers(arguments, expected):
    counter0, counter1, key = arguments
    words = philox2x32(torch.tensor([counter0]), torch.tensor([counter1]), key)
    assert tuple(int(word) for word in words) == expected
    assert scalar_philox(*arguments) == expected


@pytest.mark.parametrize("seed", [0, 1, 2**32 + 5, -1, 2**64 - 1, 0x0123456789ABCDEF])
def test_tensors_match_the_scalar_implementation(seed):
    rows = torch.tensor([0, 1, 2**31, 2**32 - 1]).unsqueeze(1)
    columns = torch.tensor([0, 7, 2**31 + 1]).unsqueeze(0)
    words = philox2x32(rows, columns, seed)
    key, high = seed % 2**32, seed // 2**32 % 2**32
    for i, row in enumerate(rows[:, 0].tolist()):
        for j, column in enumerate(columns[0].tolist()):
            expected = scalar_philox(row ^ high, column, key)
            assert (int(words[0][i, j]), int(words[1][i, j])) == expected


def test_a_seed_tensor_is_the_same_seed():
    counter = torch.arange(100)
    for seed in (3, 2**40 + 1, -5):
        as_int = philox2x32(counter, counter, seed)
        as_tensor = philox2x32(counter, counter, torch.tensor([seed]))
        assert all(torch.equal(a, b) for a, b in zip(as_int, as_tensor))


def test_uniform_numbers_are_below_one():
    ends = uniform24(torch.tensor([0, 255, 256, 2**32 - 1]))
    assert ends.tolist() == [0.0, 0.0, 2.0**-24, 1.0 - 2.0**-24]


def test_derived_seeds_differ_and_repeat():
    words = [(), (0,), (0, 0), (1,), (0, 1), (1, 0), (-1,), (2**64 - 2,), (1, 2, 3, 4)]
    seeds = [derive_seed(*w) for w in words]
    assert len(set(seeds)) == len(seeds)
    assert seeds == [derive_seed(*w) for w in words]
    assert all(0 <= seed < 2**63 for seed in seeds)
    # Neighbours share no pattern: of 64 steps about half of the bits change each time.
    flips = [(derive_seed(7, i) ^ derive_seed(7, i + 1)).bit_count() for i in range(64)]
    assert 27 < sum(flips) / len(flips) < 36


@pytest.mark.parametrize(
    "seed", [1.5, "1", True, 2**64, -(2**63) - 1, torch.tensor([1.0]), torch.tensor([1, 2])]
)
def test_wrong_seeds_are_refused(seed):
    with pytest.raises(KernelError, match="seed"):
        check_seed("op", seed, torch.device("cpu"))
