"""Counter-based random numbers: Philox2x32-7 and the mixing of seeds.

A kernel that draws numbers is a pure function of (seed, position): no generator state, so a tensor-
parallel shard draws the numbers of its place in the whole tensor and a resumed run repeats them.

Philox is from Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). Seven rounds
of Philox2x32 are the fewest that the paper reports to pass TestU01's BigCrush; the library default
of ten only adds margin, and each round is paid for once per group of four gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megasparse.errors import KernelError

PHILOX_ROUNDS = 7
PHILOX_MULTIPLIER = 0xD256D193
PHILOX_WEYL = 0x9E3779B9

_MASK32 = 0xFFFFFFFF
_MASK64 = 0xFFFFFFFFFFFFFFFF

SeedLike = int | torch.Tensor


def derive_seed(*words: int) -> int:
    """One seed in [0, 2^63) from several integers, e.g. (run seed, step, micro-batch, layer).

    Order and number of the words matter. Each word (taken modulo 2^64) passes through the
    splitmix64 finalizer, so neighbouring words give unrelated seeds. The result fits an int64
    tensor, for kernels that read their seed from the device.
    """
    state = 0
    for word in words:
        state = _splitmix64(state ^ _splitmix64(word & _MASK64))
    return state >> 1


def derive_seeds(
    prefix: Sequence[int], rows: npt.NDArray[Any], columns: npt.NDArray[Any]
) -> npt.NDArray[np.int64]:
    """int64 (rows, columns): `derive_seed(*prefix, row, column)` of each pair.

    Args:
        prefix: the words that all have in common.
        rows, columns: 1-D integers of at most 64 bits.
    """
    state = 0
    for word in prefix:
        state = _splitmix64(state ^ _splitmix64(word & _MASK64))
    with np.errstate(over="ignore"):
        start = np.uint64(state)
        by_row = _splitmix64_of(start ^ _splitmix64_of(rows.astype(np.uint64)))
        mixed = by_row[:, None] ^ _splitmix64_of(columns.astype(np.uint64))[None]
        return (_splitmix64_of(mixed) >> np.uint64(1)).astype(np.int64)


def _splitmix64_of(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """`_splitmix64` of many values; products and sums wrap modulo 2^64."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _splitmix64(value: int) -> int:
    """One step of Steele, Lea and Flood's splitmix64: add the golden gamma, then mix."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def check_seed(op: str, seed: SeedLike, device: torch.device) -> None:
    """Raises KernelError unless `seed` is an int of 64 bits or one int64 on `device`."""
    if isinstance(seed, torch.Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != device:
            raise KernelError(
                f"{op}: seed is a {seed.dtype} tensor of {seed.numel()} elements on "
                f"{seed.device}, expected one int64 on {device}"
            )
    elif not isinstance(seed, int) or isinstance(seed, bool):
        raise KernelError(f"{op}: seed is a {type(seed).__name__}, expected int or int64 tensor")
    elif not -(1 << 63) <= seed < (1 << 64):
        raise KernelError(f"{op}: seed={seed}, expected an integer of at most 64 bits")


def seed_words(seed: SeedLike) -> tuple[SeedLike, SeedLike]:
    """The low and high 32 bits of a seed, each in [0, 2^32), as ints or as int64 tensors."""
    if isinstance(seed, torch.Tensor):
        seed = seed.reshape(())
    return seed & _MASK32, (seed >> 32) & _MASK32


def philox2x32(
    counter0: torch.Tensor, counter1: torch.Tensor, seed: SeedLike
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two words in [0, 2^32) (int64) for every pair of counters, which broadcast.

    The key is the low half of `seed`; its high half is XORed into `counter0`. The counters are
    int64 tensors with values in [0, 2^32): uint32 arithmetic is emulated in int64, whose products
    wrap modulo 2^64 and so keep the right bits.
    """
    key, high = seed_words(seed)
    x0, x1 = counter0 ^ high, counter1
    for _ in range(PHILOX_ROUNDS):
        product = x0 * PHILOX_MULTIPLIER
        # In place only on tensors made here; the first rounds still have broadcast shapes.
        x0 = (product >> 32).bitwise_and_(_MASK32).bitwise_xor_(key)
        x0 = x0.bitwise_xor_(x1) if x0.shape == x1.shape else x0 ^ x1
        x1 = product.bitwise_and_(_MASK32)
        key = (key + PHILOX_WEYL) & _MASK32
    return x0, x1.expand_as(x0)


def uniform24(word: torch.Tensor) -> torch.Tensor:
    """float32 in [0, 1), a multiple of 2^-24: the top 24 bits of a 32-bit word (exact)."""
    return (word >> 8).to(torch.float32).mul_(2.0**-24)
