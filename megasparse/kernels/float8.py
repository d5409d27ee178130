"""8-bit floating point: conversion with saturation, and the operands of an 8-bit GEMM."""

from __future__ import annotations

import torch

from megasparse.errors import KernelError
from megasparse.kernels.packed24 import COLUMN_MULTIPLE, E4M3, E4M3_MAX

E5M2 = torch.float8_e5m2
# The largest finite number of each format.
MAXIMUM = {E4M3: E4M3_MAX, E5M2: 57344.0}


def quantise(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`x * scale` as e4m3 or e5m2, to nearest even, saturated (infinities too); NaN stays NaN.

    x: any shape, any floating type up to float32; scale: 0-d float32, the multiplier.
    """
    most = MAXIMUM[dtype]
    return (x.float() * scale).clamp(-most, most).to(dtype)


def fill_operands(
    y: torch.Tensor,
    scale: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor | None,
    amax: torch.Tensor | None,
) -> None:
    """The definition of operands: y (T, K) quantised into `rows` and `columns`, `amax` raised."""
    if amax is not None:
        amax.copy_(torch.maximum(amax, y.float().abs().amax()))
    tokens = y.shape[0]
    whole = rows.view(torch.uint8)  # torch neither fills nor copies every 8-bit format everywhere
    whole[tokens:] = 0
    whole[:tokens] = quantise(y, scale, rows.dtype).view(torch.uint8)
    if columns is not None:
        columns.view(torch.uint8).copy_(whole.t())


def new_operands(
    tokens: int, width: int, transposed: bool, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Memory for (T, K) in e4m3, row-major (T', K) and transposed (K, T'); T' in whole tiles."""
    multiple = COLUMN_MULTIPLE[E4M3]
    padded = -(-tokens // multiple) * multiple
    rows = torch.empty((padded, width), dtype=E4M3, device=device)
    if not transposed:
        return rows, None
    return rows, torch.empty((width, padded), dtype=E4M3, device=device)


def check_scaling(
    op: str, device: torch.device, scale: torch.Tensor, amax: torch.Tensor | None
) -> None:
    """KernelError unless scale is 0-d float32 and amax None or float32 (1,), on the device."""
    for argument, tensor, shape in (("scale", scale, ()), ("amax", amax, (1,))):
        if tensor is None:
            continue
        found = (tensor.dtype, tuple(tensor.shape), tensor.device)
        if found != (torch.float32, shape, device):
            raise KernelError(
                f"{op}: {argument} is a {tensor.dtype} tensor of shape {tuple(tensor.shape)} on "
                f"{tensor.device}, expected float32 {shape} on {device}"
            )
