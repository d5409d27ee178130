"""The digest of a tensor, by its definition in plain integers."""

from __future__ import annotations

import pytest
import torch

from megasparse.megatron import consistency

ALL = (1 << 64) - 1


def splitmix64(values: list[int]) -> int:
    """The sum of the finaliser (Steele, Lea and Flood, OOPSLA 2014) over words and places."""
    total = 0
    for place, word in enumerate(values, 1):
        z = (place * 0x9E3779B97F4A7C15 & ALL) ^ word
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & ALL
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & ALL
        total += z ^ (z >> 31)
    total &= ALL
    return total - (1 << 64) if total >> 63 else total


@pytest.mark.parametrize("count", [1, 7, 100])
def test_the_digest_is_that_of_its_definition(monkeypatch, count):
    monkeypatch.setattr(consistency, "_CHUNK", 16)
    generator = torch.Generator().manual_seed(count)
    words = torch.randint(-(1 << 63), (1 << 63) - 1, (count,), generator=generator)
    expected = splitmix64([word & ALL for word in words.tolist()])
    assert int(consistency.digest(words)) == expected
    assert int(consistency.digest(words.view(torch.float32))) == expected  # bytes alone count


def test_what_fills_no_word_is_padded_with_zeros():
    few = torch.tensor([1, 2, 3], dtype=torch.uint8)
    assert int(consistency.digest(few)) == splitmix64([0x030201])
    whole = torch.arange(20, dtype=torch.uint8)
    assert consistency.digest(whole[1:4]) == consistency.digest(torch.tensor([1, 2, 3]).byte())
