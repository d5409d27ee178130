"""Triton kernel of `transpose_float8`: four tokens a quarter of all apart become one word.

A program takes 64 channels of 4 * GROUPS tokens, row by row as they lie in memory. What moves
between threads are words of four tokens, as in `device/float8.store_operands`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from megasparse.kernels.dispatch import INTERPRETING


@dataclass(frozen=True)
class Launch:
    """Most groups of 4 tokens a program handles, 64 channels each, and its warps."""

    groups: int
    num_warps: int


LAUNCH = Launch(groups=32, num_warps=4)
# The interpreter costs time per program, not per element.
INTERPRETED = Launch(groups=64, num_warps=4)


@triton.jit
def _transpose_kernel(rows_ptr, columns_ptr, quarter, width, GROUPS: tl.constexpr):
    blocks = width // 64
    pid = tl.program_id(0)
    first_group, first_channel = (pid // blocks) * GROUPS, (pid % blocks) * 64
    group = first_group + tl.arange(0, GROUPS)[:, None]
    channel = first_channel + tl.arange(0, 64)[None, :]
    width, step = tl.cast(width, tl.int64), tl.cast(quarter, tl.int64) * width
    ptrs = rows_ptr + group.to(tl.int64) * width + channel
    a, b = tl.load(ptrs).to(tl.uint32), tl.load(ptrs + step).to(tl.uint32)
    c, d = tl.load(ptrs + 2 * step).to(tl.uint32), tl.load(ptrs + 3 * step).to(tl.uint32)
    word = (a | (b << 8) | (c << 16) | (d << 24)).to(tl.int32, bitcast=True)
    row = tl.cast(first_channel, tl.int64) + tl.arange(0, 64)[:, None]
    column = first_group + tl.arange(0, GROUPS)[None, :]
    tl.store(columns_ptr + row * quarter + column, tl.trans(word))


def transpose_float8(rows: torch.Tensor) -> torch.Tensor:
    """See reference.py."""
    rows = rows.contiguous()
    tokens, width = rows.shape
    columns = torch.empty((width, tokens), dtype=rows.dtype, device=rows.device)
    launch = INTERPRETED if INTERPRETING else LAUNCH
    quarter, groups = tokens // 4, launch.groups
    while quarter % groups:
        groups //= 2
    with torch.cuda.device_of(rows):  # Triton launches on the current device
        _transpose_kernel[((width // 64) * (quarter // groups),)](
            rows.view(torch.uint8),
            columns.view(torch.int32),
            quarter,
            width,
            GROUPS=groups,
            num_warps=launch.num_warps,
        )
    return columns
