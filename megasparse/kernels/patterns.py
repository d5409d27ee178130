"""The 2:4 patterns of a group and of a 4x4 block, and masks stored as pattern indices.

A group of 4 has 6 patterns with exactly two ones; a 4x4 block has 90 with exactly two ones in
every row and every column (FST, Hu et al., ICML 2024). Both lists are in lexicographic
descending order, rows first: 1100 is the first of the 6, 1100/1100/0011/0011 the first of the 90.
Stored as indices, a row-wise mask takes 1 byte per 4 weights and a transposable one 1 per 16.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product

import torch

from megasparse.errors import KernelError

# The 6 patterns of a group as columns kept: 1100, 1010, 1001, 0110, 0101, 0011.
PAIRS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
_INVALID = 255
_CHUNK = 1 << 20


@lru_cache(maxsize=1)
def transposable_rows() -> tuple[tuple[int, ...], ...]:
    """The 90 patterns as four indices into PAIRS each, in lexicographic descending order."""
    columns = [sum(PAIRS[row].count(col) << (4 * col) for col in range(4)) for row in range(6)]
    # `product` counts upwards in the indices, and PAIRS is descending as bit strings.
    return tuple(
        rows
        for rows in product(range(6), repeat=4)
        if sum(columns[row] for row in rows) == 0x2222  # every column sum is 2
    )


def pack_fours(mask: torch.Tensor) -> torch.Tensor:
    """bool (N, K), K a multiple of 4, as uint8 (N, K/4), a bit each; any mask, nothing is checked.

    Nothing waits for the device.
    """
    mask = mask.contiguous()
    whole = mask.clone() if mask.storage_offset() % 4 else mask
    fours = whole.view(torch.int32)  # a byte of 0 or 1 each
    packed = fours | fours >> 7 | fours >> 14 | fours >> 21
    packed.bitwise_and_(15)
    return packed.to(torch.uint8)


def unpack_fours(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_fours`."""
    bits = packed.to(torch.int32)
    fours = bits & 1 | (bits & 2) << 7 | (bits & 4) << 14 | (bits & 8) << 21
    return fours.view(torch.bool)


def transposable_patterns() -> torch.Tensor:
    """The 90 transposable patterns: bool (90, 4, 4) on CPU, in lexicographic descending order."""
    return _row_patterns()[torch.tensor(transposable_rows())]


def encode_patterns(mask: torch.Tensor, transposable: bool) -> torch.Tensor:
    """A 2:4 mask as pattern indices.

    mask: bool (N, K). Returns uint8 on the same device: (N/4, K/4) with values below 90 when
    `transposable`, else (N, K/4) with values below 6. Raises KernelError when the mask is not
    bool, not divisible by 4, or holds a group or block that is none of the patterns.
    """
    if mask.dtype != torch.bool:
        raise KernelError(f"encode_patterns: mask dtype {mask.dtype}, expected torch.bool")
    _check_shape("encode_patterns", tuple(mask.shape), transposable)
    bits = mask.view(torch.uint8) if mask.is_contiguous() else mask.to(torch.uint8)
    codes = bits[:, 0::4] << 3 | bits[:, 1::4] << 2 | bits[:, 2::4] << 1 | bits[:, 3::4]
    if transposable:
        rows = codes.to(torch.int32)
        codes = rows[0::4] << 12 | rows[1::4] << 8 | rows[2::4] << 4 | rows[3::4]
    indices = _table(transposable).to(mask.device)[codes.to(torch.int64)]
    bad = (indices == _INVALID).nonzero()
    if bad.numel():
        what = "4x4 block" if transposable else "group of 4"
        raise KernelError(
            f"encode_patterns: {what} {tuple(bad[0].tolist())} of the mask of shape "
            f"{tuple(mask.shape)} is none of the {90 if transposable else 6} patterns"
        )
    return indices


def decode_patterns(
    indices: torch.Tensor, shape: tuple[int, int] | torch.Size, transposable: bool
) -> torch.Tensor:
    """The bool mask of `shape` (N, K) that `encode_patterns` gave `indices` for.

    Raises KernelError for another dtype than uint8, a shape that does not fit, or an index that
    names no pattern.
    """
    _check_shape("decode_patterns", tuple(shape), transposable)
    rows, cols = shape
    expected = (rows // 4, cols // 4) if transposable else (rows, cols // 4)
    if indices.dtype != torch.uint8 or tuple(indices.shape) != expected:
        raise KernelError(
            f"decode_patterns: {indices.dtype} of shape {tuple(indices.shape)}, expected "
            f"torch.uint8 of shape {expected} for a mask of shape {tuple(shape)}"
        )
    limit = 90 if transposable else 6
    if indices.numel() and int(indices.max()) >= limit:
        raise KernelError(f"decode_patterns: index {int(indices.max())}, expected below {limit}")
    return expand_patterns(indices, transposable)


def expand_patterns(indices: torch.Tensor, transposable: bool) -> torch.Tensor:
    """`decode_patterns` without its checks: uint8 (R, C) -> bool (4R, 4C) or (R, 4C)."""
    rows, cols = indices.shape
    table = transposable_patterns() if transposable else _row_patterns()
    table = table.to(indices.device)
    height = 4 if transposable else 1
    mask = torch.empty((rows, height, cols, 4), dtype=torch.bool, device=indices.device)
    step = max(1, _CHUNK // max(cols, 1))
    for start in range(0, rows, step):  # bounds the int64 indices that gathering needs
        chunk = indices[start : start + step]
        picked = table[chunk.to(torch.int64)].view(*chunk.shape, height, 4)
        mask[start : start + step] = picked.transpose(1, 2)
    return mask.view(rows * height, cols * 4)


def _check_shape(op: str, shape: tuple[int, ...], transposable: bool) -> None:
    if len(shape) != 2 or shape[1] % 4 or (transposable and shape[0] % 4):
        what = "both divisible by 4" if transposable else "with K divisible by 4"
        raise KernelError(f"{op}: mask of shape {shape}, expected (N, K) {what}")


def _row_patterns() -> torch.Tensor:
    table = torch.zeros((6, 4), dtype=torch.bool)
    for row, pair in enumerate(PAIRS):
        table[row, list(pair)] = True
    return table


@lru_cache(maxsize=2)
def _table(transposable: bool) -> torch.Tensor:
    """uint8 (2^16,) or (2^4,): the bits of a block or group, first column highest -> its index."""
    table = torch.full((1 << (16 if transposable else 4),), _INVALID, dtype=torch.uint8)
    codes = [8 >> first | 8 >> second for first, second in PAIRS]
    if transposable:
        codes = [
            codes[a] << 12 | codes[b] << 8 | codes[c] << 4 | codes[d]
            for a, b, c, d in transposable_rows()
        ]
    table[torch.tensor(codes)] = torch.arange(len(codes), dtype=torch.uint8)
    return table
