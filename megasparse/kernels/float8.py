"""8-bit floating point: conversion with saturation, and the operands of an 8-bit GEMM."""

from __future__ import annotations

import torch

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
