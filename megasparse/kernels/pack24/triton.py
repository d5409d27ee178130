"""Triton kernels of `pack24`; reference.py is the definition.

A program handles 64 rows, the height of a metadata block, so the metadata it writes is contiguous:
only the 4-bit codes (1/16 of the bytes) change threads on their way. Weights move as integers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from megasparse.kernels.device.float8 import to_float8
from megasparse.kernels.device.groups import widen
from megasparse.kernels.device.layout24 import crowded8, select8
from megasparse.kernels.dispatch import INTERPRETING
from megasparse.kernels.packed24 import Packed24, empty_packed


@dataclass(frozen=True)
class Launch:
    """Most columns a program handles (64 rows each) and its warps."""

    columns: int
    num_warps: int


PACK = Launch(columns=128, num_warps=4)
# The interpreter costs time per program, not per element.
INTERPRETED = Launch(columns=1024, num_warps=4)


@triton.jit
def _select(w, ROWS: tl.constexpr, GROUPS: tl.constexpr, MAGNITUDE: tl.constexpr):
    """The kept two of each 4 columns, the code, and whether more than two are non-zero.

    MAGNITUDE masks the sign bit off integers; 0 for floats.
    """
    even, odd = tl.split(tl.reshape(w, (ROWS, GROUPS, 2, 2)))
    w0, w2 = tl.split(even)
    w1, w3 = tl.split(odd)
    if MAGNITUDE:
        n0, n1 = (w0 & MAGNITUDE) != 0, (w1 & MAGNITUDE) != 0
        n2, n3 = (w2 & MAGNITUDE) != 0, (w3 & MAGNITUDE) != 0
    else:
        n0, n1, n2, n3 = w0 != 0, w1 != 0, w2 != 0, w3 != 0
    several = (n0 & n1) | (n0 & n2) | (n1 & n2)
    v0 = tl.where(n0, w0, tl.where(n1, w1, w2))
    last = n3 | (several == 0)
    v1 = tl.where(last, w3, tl.where(n2, w2, w1))
    i0 = tl.where(n0, 0, tl.where(n1, 1, 2))
    i1 = tl.where(last, 12, tl.where(n2, 8, 4))  # shifted left by 2
    return v0, v1, i0 | i1, (several & n3) | (n0 & n1 & n2)


@triton.jit
def kept_columns(tile, COLUMNS: tl.constexpr, HELD: tl.constexpr):
    """Columns of the tile in the values, HELD to a thread: what 16 bytes of dense columns give.

    Without the hint Triton moves values between threads, through shared memory, to write 16 bytes
    at once.
    """
    column = tile * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)[None, :]
    return tl.max_contiguous(column, [1, HELD])


@triton.jit
def _raise_flag(flag_ptr, violated):
    tl.store(flag_ptr, 1, mask=tl.max(tl.max(violated.to(tl.int32), 1), 0) != 0)


@triton.jit
def _pack16_kernel(
    w_ptr, values_ptr, metadata_ptr, flag_ptr, num_columns, w_stride, COLUMNS: tl.constexpr
):
    """16-bit weights as int16: rows r and r + 8 share their metadata bytes."""
    GROUPS: tl.constexpr = COLUMNS // 4
    tiles = num_columns // COLUMNS
    pid = tl.program_id(0)
    block_row, tile = pid // tiles, pid % tiles
    i = tl.arange(0, 32)[:, None]
    row = block_row.to(tl.int64) * 64 + (i // 8) * 16 + i % 8
    column = tile * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    w_ptrs = w_ptr + row * w_stride + column
    low = tl.load(w_ptrs)
    high = tl.load(w_ptrs + 8 * tl.cast(w_stride, tl.int64))
    low0, low1, low_code, low_violated = _select(low, 32, GROUPS, 0x7FFF)
    high0, high1, high_code, high_violated = _select(high, 32, GROUPS, 0x7FFF)
    _raise_flag(flag_ptr, low_violated | high_violated)
    kept_column = kept_columns(tile, COLUMNS, 4)
    half = tl.cast(num_columns // 2, tl.int64)
    values_ptrs = values_ptr + row * half + kept_column
    tl.store(values_ptrs, tl.reshape(tl.join(low0, low1), (32, COLUMNS // 2)))
    tl.store(values_ptrs + 8 * half, tl.reshape(tl.join(high0, high1), (32, COLUMNS // 2)))
    byte = (low_code | (high_code << 4)).to(tl.uint8)
    # (a, b, G, gh, gl) -> (G, a, b, gl, gh)
    byte = tl.permute(tl.reshape(byte, (4, 8, COLUMNS // 32, 2, 4)), (2, 0, 1, 4, 3))
    start = block_row.to(tl.int64) * 8 * num_columns + tile * (8 * COLUMNS)
    offset = tl.arange(0, 8 * COLUMNS)
    tl.store(metadata_ptr + start + offset, tl.reshape(byte, (8 * COLUMNS,)))


@triton.jit
def _store_metadata8(metadata_ptr, code, block_row, tile, num_columns, COLUMNS: tl.constexpr):
    """The codes (64, COLUMNS / 4) of a tile, two adjacent groups a byte, in the 8-bit order."""
    even, odd = tl.split(tl.reshape(code, (64, COLUMNS // 8, 2)))
    byte = (even | (odd << 4)).to(tl.uint8)
    # (a, h, b, G, g8, gq) -> (G, a, b, gq, g8, h)
    byte = tl.permute(tl.reshape(byte, (4, 2, 8, COLUMNS // 64, 2, 4)), (3, 0, 2, 5, 4, 1))
    start = block_row.to(tl.int64) * 8 * num_columns + tile * (8 * COLUMNS)
    offset = tl.arange(0, 8 * COLUMNS)
    tl.store(metadata_ptr + start + offset, tl.reshape(byte, (8 * COLUMNS,)))


@triton.jit
def _pack8_kernel(
    w_ptr, values_ptr, metadata_ptr, flag_ptr, num_columns, w_stride, COLUMNS: tl.constexpr
):
    """8-bit weights, a group to an int32 (w_stride counts those), two kept to an int16."""
    GROUPS: tl.constexpr = COLUMNS // 4
    tiles = num_columns // COLUMNS
    pid = tl.program_id(0)
    block_row, tile = pid // tiles, pid % tiles
    row = block_row.to(tl.int64) * 64 + tl.arange(0, 64)[:, None]
    group = tile * GROUPS + tl.arange(0, GROUPS)[None, :]
    w = tl.load(w_ptr + row * w_stride + group).to(tl.uint32, bitcast=True)
    kept, code = select8(w)
    _raise_flag(flag_ptr, crowded8(w) >> 31)
    values_ptrs = values_ptr + row * (num_columns // 4) + tl.max_contiguous(group, [1, 4])
    tl.store(values_ptrs, kept.to(tl.int16))
    _store_metadata8(metadata_ptr, code, block_row, tile, num_columns, COLUMNS)


@triton.jit
def _quantize_pack8_kernel(
    w_ptr,
    values_ptr,
    metadata_ptr,
    flag_ptr,
    scale_inv_ptr,
    num_columns,
    w_stride,
    COLUMNS: tl.constexpr,
):
    """Wider weights: the kept two times 1 / *scale_inv_ptr as e4m3, saturated."""
    GROUPS: tl.constexpr = COLUMNS // 4
    tiles = num_columns // COLUMNS
    pid = tl.program_id(0)
    block_row, tile = pid // tiles, pid % tiles
    row = block_row.to(tl.int64) * 64 + tl.arange(0, 64)[:, None]
    column = tile * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    w = widen(tl.load(w_ptr + row * w_stride + column))
    v0, v1, code, violated = _select(w, 64, GROUPS, 0)
    _raise_flag(flag_ptr, violated)
    factor = tl.div_rn(1.0, tl.load(scale_inv_ptr))
    values = tl.reshape(tl.join(v0, v1), (64, COLUMNS // 2)) * factor
    HELD: tl.constexpr = 64 // w_ptr.dtype.element_ty.primitive_bitwidth
    kept_column = kept_columns(tile, COLUMNS, HELD)
    tl.store(values_ptr + row * (num_columns // 2) + kept_column, to_float8(values, False))
    _store_metadata8(metadata_ptr, code, block_row, tile, num_columns, COLUMNS)


def pack24(
    w: torch.Tensor, dtype: torch.dtype, scale_inv: torch.Tensor, flag: torch.Tensor
) -> Packed24:
    """See reference.py; sets `flag` (int32, one element) to 1 when a group is crowded."""
    packed = empty_packed((w.shape[0], w.shape[1]), dtype, scale_inv, w.device)
    if w.stride(1) != 1:
        w = w.contiguous()
    if dtype.itemsize == 2:
        _pack(_pack16_kernel, (w.view(torch.int16), torch.int16, flag), packed, 64)
    elif w.dtype == dtype:
        if w.stride(0) % 4 or w.storage_offset() % 4:
            w = w.clone(memory_format=torch.contiguous_format)
        _pack(_pack8_kernel, (w.view(torch.int32), torch.int16, flag), packed, 128)
    else:
        _pack(_quantize_pack8_kernel, (w, torch.int8, flag, scale_inv), packed, 128)
    return packed


def _pack(
    kernel: triton.JITFunction, tensors: tuple[Any, ...], packed: Packed24, multiple: int
) -> None:
    """Launch one of the three.

    Args:
        tensors: w as the kernel loads it, the type of what it stores, and its other arguments.
        multiple: of columns, that a tile has at least.
    """
    w, stored, *others = tensors
    launch = INTERPRETED if INTERPRETING else PACK
    grid, columns = grid_of(packed, launch, multiple)
    kernel[grid](
        w,
        packed.values.view(stored),
        packed.metadata,
        *others,
        packed.shape[1],
        w.stride(0),
        COLUMNS=columns,
        num_warps=launch.num_warps,
    )


def grid_of(packed: Packed24, launch: Launch, multiple: int) -> tuple[tuple[int], int]:
    """The grid, and the widest tile that divides the columns (always a multiple of `multiple`)."""
    rows, total = packed.shape
    columns = launch.columns
    while columns > multiple and total % columns:
        columns //= 2
    return (rows // 64 * (total // columns),), columns
