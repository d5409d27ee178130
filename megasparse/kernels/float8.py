"""8-bit floating point: conversion with saturation, and the operands of an 8-bit GEMM."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megasparse.errors import KernelError
from megasparse.kernels.checks import require
from megasparse.kernels.packed24 import COLUMN_MULTIPLE, E4M3, E4M3_MAX
from megasparse.kernels.token_order import by_groups

E5M2 = torch.float8_e5m2
# The largest finite number of each format.
MAXIMUM = {E4M3: E4M3_MAX, E5M2: 57344.0}


def quantize(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`x * scale` as e4m3 or e5m2, to nearest even, saturated (infinities too); NaN stays NaN.

    x: any shape, any floating type up to float32; scale: 0-d float32, the multiplier.
    """
    most = MAXIMUM[dtype]
    return (x.float() * scale).clamp(-most, most).to(dtype)


def whole_tiles(tokens: int) -> int:
    """T': tokens up to a multiple of 128, which an 8-bit operand has, with zeros."""
    multiple = COLUMN_MULTIPLE[E4M3]
    return -(-tokens // multiple) * multiple


def operands(
    y: torch.Tensor, scale: torch.Tensor, transposed: bool, strided: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """The definition of operands: y (T, K) in e4m3, and the largest |y|.

    Returns: (T', K), its transpose (K, T') if `transposed`, in the order of strided groups if
    `strided`; 0-d float32.
    """
    tokens, width = y.shape
    # By bytes: torch neither fills nor copies every 8-bit format everywhere.
    rows = torch.zeros((whole_tiles(tokens), width), dtype=torch.uint8, device=y.device)
    rows[:tokens] = quantize(y, scale, E4M3).view(torch.uint8)
    ordered = by_groups(rows) if strided else rows
    columns = ordered.t().contiguous().view(E4M3) if transposed else None
    return rows.view(E4M3), columns, y.float().abs().amax()


def new_operands(
    tokens: int, width: int, transposed: bool, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Memory for (T, K) in e4m3, row-major (T', K) and transposed (K, T'); T' in whole tiles."""
    padded = whole_tiles(tokens)
    rows = torch.empty((padded, width), dtype=E4M3, device=device)
    if not transposed:
        return rows, None
    return rows, torch.empty((width, padded), dtype=E4M3, device=device)


def raise_amax(amax: torch.Tensor | None, found: torch.Tensor) -> None:
    """Raise `amax` (float32 (1,)), if there is one, to `found` (0-d); NaN is the largest."""
    if amax is not None:
        amax.copy_(torch.maximum(amax, found))


def check_scaling(
    op: str, device: torch.device, scale: torch.Tensor, amax: torch.Tensor | None
) -> None:
    """KernelError unless scale is 0-d float32 and amax None or float32 (1,), on the device."""
    require(op, "scale", scale, torch.float32, (), device)
    require(op, "amax", amax, torch.float32, (1,), device)


def check_parts(op: str, counts: Sequence[int], rows: int) -> None:
    """KernelError unless `counts` are all rows, some, in whole tiles of 8-bit operands."""
    multiple = COLUMN_MULTIPLE[E4M3]
    if not rows or sum(counts) != rows or any(n < 0 or n % multiple for n in counts):
        raise KernelError(
            f"{op}: {list(counts)} rows of {rows}, expected all of some, in multiples of {multiple}"
        )


def blocks_of(blocks: torch.Tensor, counts: Sequence[int]) -> list[torch.Tensor]:
    """The matrices (K, T_e) that lie one after the other in (K T',)."""
    width = blocks.numel() // sum(counts)
    parts = blocks.split([width * count for count in counts])
    return [part.view(width, count) for part, count in zip(parts, counts, strict=True)]


def transposed_blocks(rows: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """Rows (T', K) of 8 bits: the (K, T_e) of each part, one after the other in (K T',)."""
    # By bytes: torch does not join every 8-bit format everywhere.
    parts = rows.view(torch.uint8).split(list(counts))
    return torch.cat([part.t().reshape(-1) for part in parts]).view(rows.dtype)
