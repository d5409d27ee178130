"""Triton kernels of `gather_rows`, its reverse, and `gather_float8`: each wanted row is read once.

In 8 bits a program takes 64 channels of 4 * GROUPS rows of one expert, as `activation_float8` does:
what moves between threads for the transposed copy are words of four rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from megasparse.kernels.activation_float8.triton import INTERPRETED, LAUNCH
from megasparse.kernels.device.float8 import (
    largest_of_four,
    raise_amax,
    store_operands,
    words_of_part,
)
from megasparse.kernels.device.groups import rounded, widen
from megasparse.kernels.dispatch import INTERPRETING
from megasparse.kernels.launches import KINDS
from megasparse.kernels.mvue24.triton_tile import groups_of_parts, parts_of_tiles
from megasparse.kernels.packed24 import E4M3

# Entries of a program, and of a row at a time at most.
ENTRIES, COLUMNS = 4096, 512


@triton.jit
def _gather_rows_kernel(
    x_ptr, sources_ptr, rows_ptr, num_rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    blocks = tl.cdiv(width, COLUMNS)
    pid = tl.program_id(0)
    row = (pid // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (pid % blocks) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    source = tl.load(sources_ptr + row, mask=row < num_rows, other=-1).to(tl.int64)
    inside = column < width
    x = tl.load(x_ptr + source * width + column, mask=(source >= 0) & inside, other=0.0)
    tl.store(rows_ptr + row * width + column, x, mask=(row < num_rows) & inside)


@triton.jit
def _sum_rows_kernel(
    rows_ptr,
    spots_ptr,
    parts_ptr,
    out_ptr,
    num_tokens,
    width,
    EACH: tl.constexpr,
    KIND: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    blocks = tl.cdiv(width, COLUMNS)
    pid = tl.program_id(0)
    token = (pid // blocks).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    column = (pid % blocks) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = column < width
    total = tl.zeros((TOKENS, COLUMNS), tl.float32)
    for number in range(EACH):
        part = tl.load(parts_ptr + token * EACH + number, mask=token < num_tokens, other=-1)
        held = part >= 0
        spot = tl.load(spots_ptr + part, mask=held, other=0)
        total += widen(tl.load(rows_ptr + spot * width + column, mask=held & inside, other=0.0))
    total = tl.where(total == total, rounded(total, KIND), total)
    out = out_ptr + token * width + column
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=(token < num_tokens) & inside)


@triton.jit
def _load_row(x_ptr, sources_ptr, row, stride, channel):
    """x of the rows' sources in float32, zeros where there is none."""
    if sources_ptr is None:
        return widen(tl.load(x_ptr + row * stride + channel))
    else:
        source = tl.load(sources_ptr + row).to(tl.int64)
        return widen(tl.load(x_ptr + source * stride + channel, mask=source >= 0, other=0.0))


@triton.jit
def _gather_float8_kernel(
    x_ptr,
    sources_ptr,
    rows_ptr,
    columns_ptr,
    parts_ptr,
    scale_ptr,
    amax_ptr,
    width,
    stride,
    GROUPS: tl.constexpr,
):
    blocks = width // 64
    pid = tl.program_id(0)
    tile, block = pid // blocks, pid % blocks
    row = (tile * GROUPS + tl.arange(0, GROUPS)[:, None]).to(tl.int64) * 4
    channel = block * 64 + tl.arange(0, 64)[None, :]
    stride, width = tl.cast(stride, tl.int64), tl.cast(width, tl.int64)
    scale = tl.load(scale_ptr)
    a = _load_row(x_ptr, sources_ptr, row, stride, channel)
    b = _load_row(x_ptr, sources_ptr, row + 1, stride, channel)
    c = _load_row(x_ptr, sources_ptr, row + 2, stride, channel)
    d = _load_row(x_ptr, sources_ptr, row + 3, stride, channel)
    if amax_ptr is not None:
        raise_amax(amax_ptr, largest_of_four(a, b, c, d))
    length = 4
    if columns_ptr is not None:
        columns_ptr, length = words_of_part(columns_ptr, parts_ptr, tile, width)
    store_operands(
        a * scale,
        b * scale,
        c * scale,
        d * scale,
        rows_ptr,
        columns_ptr,
        tile * GROUPS,
        block * 64,
        width,
        length,
        False,
        GROUPS,
        64,
    )


def gather_rows(x: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
    """See reference.py."""
    x, count = x.contiguous(), sources.numel()
    rows = x.new_empty(count, *x.shape[1:])
    width = math.prod(x.shape[1:])
    if rows.numel():
        columns = min(triton.next_power_of_2(width), COLUMNS)
        at_a_time = (1 << 16 if INTERPRETING else ENTRIES) // columns
        _gather_rows_kernel[(triton.cdiv(count, at_a_time) * triton.cdiv(width, columns),)](
            x, sources, rows, count, width, ROWS=at_a_time, COLUMNS=columns, num_warps=4
        )
    return rows


def sum_rows(rows: torch.Tensor, spots: torch.Tensor, parts: torch.Tensor) -> torch.Tensor:
    """See reference.py."""
    rows, (tokens, each), width = rows.contiguous(), parts.shape, rows.shape[1]
    out = rows.new_empty(tokens, width)
    if out.numel():
        columns = min(triton.next_power_of_2(width), COLUMNS)
        at_a_time = (1 << 16 if INTERPRETING else ENTRIES) // columns
        _sum_rows_kernel[(triton.cdiv(tokens, at_a_time) * triton.cdiv(width, columns),)](
            rows,
            spots,
            parts.contiguous(),
            out,
            tokens,
            width,
            EACH=each,
            KIND=KINDS[rows.dtype],
            TOKENS=at_a_time,
            COLUMNS=columns,
            num_warps=4,
        )
    return out


def gather_float8(
    x: torch.Tensor,
    sources: torch.Tensor | None,
    counts: Sequence[int],
    scale: torch.Tensor,
    transposed: bool,
    amax: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See reference.py; raises `amax`."""
    if x.stride(1) != 1:
        x = x.contiguous()
    count, width = sum(counts), x.shape[1]
    rows = torch.empty((count, width), dtype=E4M3, device=x.device)
    blocks = torch.empty(count * width, dtype=E4M3, device=x.device) if transposed else None
    launch = INTERPRETED if INTERPRETING else LAUNCH
    groups = groups_of_parts(counts, launch.groups)
    _gather_float8_kernel[((width // 64) * (count // (4 * groups)),)](
        x,
        sources,
        rows.view(torch.int8),
        None if blocks is None else blocks.view(torch.int32),
        parts_of_tiles(counts, 4 * groups, x.device) if transposed else None,
        scale,
        None if amax is None else amax.view(torch.int32),
        width,
        x.stride(0),
        GROUPS=groups,
        num_warps=launch.num_warps,
    )
    return rows, blocks
