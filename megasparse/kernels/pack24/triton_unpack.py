"""Triton kernels of `unpack24`; reference.py is the definition, and triton.py has the layout."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megasparse.kernels.dispatch import INTERPRETING
from megasparse.kernels.pack24.triton import INTERPRETED, Launch, grid_of, kept_columns
from megasparse.kernels.packed24 import Packed24

UNPACK = Launch(columns=128, num_warps=4)


@triton.jit
def _place(values, code, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Dense rows from the kept values (ROWS, COLUMNS / 2) and the codes (ROWS, COLUMNS / 4)."""
    v0, v1 = tl.split(tl.reshape(values, (ROWS, COLUMNS // 4, 2)))
    zero = tl.zeros_like(v0)
    # In one word with the first value the code is moved once to the threads that hold the values.
    word = (v0.to(tl.int32) & 0xFFFF) | (code.to(tl.int32) << 16)
    v0, code = word.to(values.dtype), word >> 16
    i0, i1 = code & 3, code >> 2
    w0 = tl.where(i0 == 0, v0, zero)
    w1 = tl.where(i0 == 1, v0, tl.where(i1 == 1, v1, zero))
    w2 = tl.where(i0 == 2, v0, tl.where(i1 == 2, v1, zero))
    w3 = tl.where(i1 == 3, v1, zero)
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (ROWS, COLUMNS))


@triton.jit
def _unpack16_kernel(values_ptr, metadata_ptr, w_ptr, num_columns, COLUMNS: tl.constexpr):
    tiles = num_columns // COLUMNS
    pid = tl.program_id(0)
    block_row, tile = pid // tiles, pid % tiles
    start = block_row.to(tl.int64) * 8 * num_columns + tile * (8 * COLUMNS)
    byte = tl.load(metadata_ptr + start + tl.arange(0, 8 * COLUMNS))
    # (G, a, b, gl, gh) -> (a, b, G, gh, gl)
    byte = tl.permute(tl.reshape(byte, (COLUMNS // 32, 4, 8, 4, 2)), (1, 2, 0, 4, 3))
    byte = tl.reshape(byte, (32, COLUMNS // 4))
    i = tl.arange(0, 32)[:, None]
    row = block_row.to(tl.int64) * 64 + (i // 8) * 16 + i % 8
    half = tl.cast(num_columns // 2, tl.int64)
    kept_column = kept_columns(tile, COLUMNS, 4)
    values_ptrs = values_ptr + row * half + kept_column
    low = _place(tl.load(values_ptrs), byte & 15, 32, COLUMNS)
    high = _place(tl.load(values_ptrs + 8 * half), byte >> 4, 32, COLUMNS)
    column = tile * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    w_ptrs = w_ptr + row * num_columns + column
    tl.store(w_ptrs, low)
    tl.store(w_ptrs + 8 * tl.cast(num_columns, tl.int64), high)


@triton.jit
def _unpack8_kernel(
    values_ptr, metadata_ptr, w_ptr, scale_inv_ptr, num_columns, COLUMNS: tl.constexpr
):
    tiles = num_columns // COLUMNS
    pid = tl.program_id(0)
    block_row, tile = pid // tiles, pid % tiles
    start = block_row.to(tl.int64) * 8 * num_columns + tile * (8 * COLUMNS)
    byte = tl.load(metadata_ptr + start + tl.arange(0, 8 * COLUMNS))
    # (G, a, b, gq, g8, h) -> (a, h, b, G, g8, gq)
    byte = tl.permute(tl.reshape(byte, (COLUMNS // 64, 4, 8, 4, 2, 2)), (1, 5, 2, 0, 4, 3))
    byte = tl.reshape(byte, (64, COLUMNS // 8))
    code = tl.reshape(tl.join(byte & 15, byte >> 4), (64, COLUMNS // 4))
    row = block_row.to(tl.int64) * 64 + tl.arange(0, 64)[:, None]
    kept_column = kept_columns(tile, COLUMNS, 2)
    bits = tl.load(values_ptr + row * (num_columns // 2) + kept_column)
    dense = _place(bits, code, 64, COLUMNS).to(tl.float8e4nv, bitcast=True).to(tl.float32)
    column = tile * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(w_ptr + row * num_columns + column, dense * tl.load(scale_inv_ptr))


def unpack24(packed: Packed24) -> torch.Tensor:
    """See reference.py."""
    launch = INTERPRETED if INTERPRETING else UNPACK
    wide = packed.dtype.itemsize == 2
    out = torch.empty(
        packed.shape,
        dtype=packed.dtype if wide else torch.float32,
        device=packed.values.device,
    )
    grid, columns = grid_of(packed, launch, 64 if wide else 128)
    if wide:
        _unpack16_kernel[grid](
            packed.values.view(torch.int16),
            packed.metadata,
            out.view(torch.int16),
            packed.shape[1],
            COLUMNS=columns,
            num_warps=launch.num_warps,
        )
    else:
        _unpack8_kernel[grid](
            packed.values.view(torch.int8),
            packed.metadata,
            out,
            packed.scale,
            packed.shape[1],
            COLUMNS=columns,
            num_warps=launch.num_warps,
        )
    return out
