"""Triton kernels of `quantize_rows` and `rescale_rows_`: a program holds a row or part of one."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megasparse.kernels.device.float8 import to_float8
from megasparse.kernels.device.groups import rounded, widen
from megasparse.kernels.launches import KINDS
from megasparse.kernels.packed24 import E4M3

# Entries of a row that a program of `_rescale_kernel` takes: 16 bytes a thread, four times.
RESCALED = 4096


@triton.jit
def _quantize_kernel(
    x_ptr, rows_ptr, scale_inv_ptr, num_rows, num_columns, x_stride, BLOCK: tl.constexpr
):
    """One row: its magnitude as float32 bits, which are ordered alike, NaN above all."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < num_columns
    x = widen(tl.load(x_ptr + row * x_stride + column, mask=inside & (row < num_rows), other=0.0))
    bits = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    finite = bits < 0x7F800000
    usable = finite & (bits > 0)
    # 448 is 1.75 * 2^8: the exponent of the scale, as float32 holds it, follows from the bits.
    power = tl.minimum(262 - (bits >> 23) - tl.where((bits & 0x7FFFFF) > 0x600000, 1, 0), 253)
    power = tl.where(usable, power, 127)
    scale = (power << 23).to(tl.float32, bitcast=True)
    tl.store(rows_ptr + row * num_columns + column, to_float8(x * scale, False), mask=inside)
    scale_inv = ((254 - power) << 23).to(tl.float32, bitcast=True)
    scale_inv = tl.where(finite, scale_inv, float("nan"))
    tl.store(scale_inv_ptr + row, scale_inv, mask=row < num_rows)


@triton.jit
def _rescale_kernel(
    z_ptr,
    scale_inv_ptr,
    bias_ptr,
    applied_inv,
    num_columns,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(num_columns, BLOCK)
    pid = tl.program_id(0)
    row = (pid // blocks).to(tl.int64)
    column = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    factor = tl.load(scale_inv_ptr + row) * applied_inv
    here, live = z_ptr + row * num_columns + column, column < num_columns
    z = widen(tl.load(here, mask=live, other=0.0)) * factor
    if bias_ptr is not None:
        z += widen(tl.load(bias_ptr + column, mask=live, other=0.0))
    z = tl.where(z == z, rounded(z, KIND), z)
    tl.store(here, z.to(z_ptr.dtype.element_ty), mask=live)


def quantize_rows(x: torch.Tensor, padded: int) -> tuple[torch.Tensor, torch.Tensor]:
    """See reference.py."""
    if x.stride(1) != 1:
        x = x.contiguous()
    tokens, width = x.shape
    rows = torch.empty((padded, width), dtype=E4M3, device=x.device)
    scale_inv = torch.empty(tokens, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(width)
    if padded:
        _quantize_kernel[(padded,)](
            x,
            rows.view(torch.int8),
            scale_inv,
            tokens,
            width,
            x.stride(0),
            BLOCK=block,
            num_warps=min(max(block // 1024, 1), 16),  # 32 entries a thread, 128 in the longest
        )
    return rows, scale_inv


def rescale_rows_(
    z: torch.Tensor, scale_inv: torch.Tensor, bias: torch.Tensor | None, applied_inv: float
) -> None:
    """`reference.rescaled_rows` of z, in place."""
    tokens, width = z.shape
    block = min(triton.next_power_of_2(width), RESCALED)
    _rescale_kernel[(tokens * triton.cdiv(width, block),)](
        z,
        scale_inv,
        None if bias is None else bias.contiguous(),
        applied_inv,
        width,
        KIND=KINDS[z.dtype],
        BLOCK=block,
        num_warps=4,
    )
