"""Triton kernels of figures of whole tensors: one pass that reads alone, then one small program.

A program walks over its blocks and writes one partial result of each kind; there are few enough of
them for one program to add up. Programs and blocks depend on the size of the tensor alone, and no
float is added atomically: the same tensor gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megasparse.kernels.device.groups import widen
from megasparse.kernels.dispatch import INTERPRETING
from megasparse.kernels.launches import Launch, Launches

# In entries. Two loads of 16 bytes a thread are under way; the threads' float64 sums, of four
# neighbours each, leave room for eight programs a multiprocessor.
WIDE = Launches(wide=Launch(block=1024, num_warps=4), narrow=Launch(block=2048, num_warps=4))
BYTES = Launch(block=4096, num_warps=4)
# Enough to fill a large GPU (132 multiprocessors, 8 programs each).
MAX_PROGRAMS = 1056
# Partial results that the one program of a finishing kernel reads at once: all of them.
PARTIALS = 2048
# The interpreter costs time per program, not per element.
INTERPRETED = Launch(block=1 << 16, num_warps=4)


@triton.jit
def _wide_kernel(x_ptr, sums_ptr, largest_ptr, size, BLOCK: tl.constexpr):
    """Of a program: non-zeros, magnitude and square (float64, a row each), largest (its bits)."""
    nonzeros = tl.zeros((BLOCK // 4,), tl.int32)
    largest = tl.zeros((BLOCK // 4,), tl.int32)
    magnitude = tl.zeros((BLOCK // 4,), tl.float64)
    square = tl.zeros((BLOCK // 4,), tl.float64)
    programs = tl.num_programs(0)
    at = tl.program_id(0).to(tl.int64) * BLOCK
    while at < size:
        here = at + tl.arange(0, BLOCK)
        x = widen(tl.load(x_ptr + here, mask=here < size, other=0.0))
        # Bits are ordered like magnitudes, NaN above all; subnormal numbers stay what they are.
        bits = tl.reshape(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, (BLOCK // 4, 4))
        nonzeros += tl.sum((bits != 0).to(tl.int32), 1)
        largest = tl.maximum(largest, tl.max(bits, 1))
        # float64, in which the square of every float32 is a normal number.
        wide = bits.to(tl.float32, bitcast=True).to(tl.float64)
        magnitude += tl.sum(wide, 1)
        square += tl.sum(wide * wide, 1)
        at += programs.to(tl.int64) * BLOCK
    pid = tl.program_id(0)
    tl.store(sums_ptr + pid, tl.sum(nonzeros.to(tl.float64)))
    tl.store(sums_ptr + programs + pid, tl.sum(magnitude))
    tl.store(sums_ptr + 2 * programs + pid, tl.sum(square))
    tl.store(largest_ptr + pid, tl.max(largest))


@triton.jit
def _byte_kernel(
    q_ptr, sums_ptr, size, E5M2: tl.constexpr, SQUARE: tl.constexpr, BLOCK: tl.constexpr
):
    """Of a program: non-zeros, entries at the format's limit, square (float64, a row each)."""
    nonzeros = tl.zeros((BLOCK // 4,), tl.int32)
    at_limit = tl.zeros((BLOCK // 4,), tl.int32)
    square = tl.zeros((BLOCK // 4,), tl.float64)
    programs = tl.num_programs(0)
    at = tl.program_id(0).to(tl.int64) * BLOCK
    while at < size:
        here = at + tl.arange(0, BLOCK)
        byte = tl.load(q_ptr + here, mask=here < size, other=0).to(tl.int32) & 0x7F
        byte = tl.reshape(byte, (BLOCK // 4, 4))
        nonzeros += tl.sum((byte != 0).to(tl.int32), 1)
        # The largest finite number is followed by infinity (e5m2 alone), then by NaN.
        limited = (byte == 0x7B) | (byte == 0x7C) if E5M2 else byte == 0x7E
        at_limit += tl.sum(limited.to(tl.int32), 1)
        if SQUARE:
            # Both formats as float16: e5m2 is its upper byte, e4m3's exponent is 8 too low there.
            half = byte << (8 if E5M2 else 7)
            value = half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            if not E5M2:
                value = tl.where(byte == 0x7F, float("nan"), value * 256.0)
            square += tl.sum(value * value, 1).to(tl.float64)
        at += programs.to(tl.int64) * BLOCK
    pid = tl.program_id(0)
    tl.store(sums_ptr + pid, tl.sum(nonzeros.to(tl.float64)))
    tl.store(sums_ptr + programs + pid, tl.sum(at_limit.to(tl.float64)))
    tl.store(sums_ptr + 2 * programs + pid, tl.sum(square))


@triton.jit
def _total(row_ptr, programs, BLOCK: tl.constexpr):
    """The sum of one row of partial results."""
    lane = tl.arange(0, BLOCK)
    return tl.sum(tl.load(row_ptr + lane, mask=lane < programs, other=0.0))


@triton.jit
def _largest(bits_ptr, programs, BLOCK: tl.constexpr):
    """The bits of the largest of the programs' magnitudes."""
    lane = tl.arange(0, BLOCK)
    return tl.max(tl.load(bits_ptr + lane, mask=lane < programs, other=0))


@triton.jit
def _figures_kernel(sums_ptr, largest_ptr, out_ptr, most_ptr, programs, BLOCK: tl.constexpr):
    for row in tl.static_range(3):
        tl.store(out_ptr + row, _total(sums_ptr + row * programs, programs, BLOCK))
    tl.store(most_ptr, _largest(largest_ptr, programs, BLOCK))


@triton.jit
def _square_kernel(row_ptr, total_ptr, factor_ptr, programs, BLOCK: tl.constexpr):
    """total += square * factor^2, without a pointer a factor of 1."""
    square = _total(row_ptr, programs, BLOCK)
    if factor_ptr is not None:
        times = tl.load(factor_ptr).to(tl.float64)
        square = square * (times * times)
    tl.store(total_ptr, tl.load(total_ptr) + square)


@triton.jit
def _rounding_kernel(
    wide_ptr,
    bits_ptr,
    byte_ptr,
    sums_ptr,
    largest_ptr,
    entries,
    wide_programs,
    byte_programs,
    BLOCK: tl.constexpr,
):
    lost = _total(wide_ptr, wide_programs, BLOCK) - _total(byte_ptr, byte_programs, BLOCK)
    at_limit = _total(byte_ptr + byte_programs, byte_programs, BLOCK)
    tl.store(sums_ptr, tl.load(sums_ptr) + at_limit)
    tl.store(sums_ptr + 1, tl.load(sums_ptr + 1) + lost)
    tl.store(sums_ptr + 2, tl.load(sums_ptr + 2) + tl.cast(entries, tl.float64))
    # As integers a negative number is below all magnitudes.
    most = _largest(bits_ptr, wide_programs, BLOCK)
    tl.store(largest_ptr, tl.maximum(tl.load(largest_ptr), most))


def tensor_figures(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """See reference.py."""
    sums, bits = _of_wide(x)
    out = torch.empty(3, dtype=torch.float64, device=x.device)
    most = torch.empty((), dtype=torch.float32, device=x.device)
    _figures_kernel[(1,)](
        sums, bits, out, most.view(torch.int32), sums.shape[1], BLOCK=PARTIALS, num_warps=8
    )
    return *out.unbind(), most


def add_square_(total: torch.Tensor, x: torch.Tensor, factor: float | torch.Tensor) -> None:
    """total += `reference.square` of x times the factor's."""
    sums = _of_bytes(x, square=True) if x.itemsize == 1 else _of_wide(x)[0]
    if not isinstance(factor, torch.Tensor) and factor != 1.0:
        factor = torch.full((), factor, dtype=torch.float64, device=x.device)
    factor_ptr = factor if isinstance(factor, torch.Tensor) else None
    _square_kernel[(1,)](sums[2], total, factor_ptr, sums.shape[1], BLOCK=PARTIALS, num_warps=8)


def add_rounding_figures_(
    sums: torch.Tensor, largest: torch.Tensor, values: torch.Tensor, rounded: torch.Tensor
) -> None:
    """sums += `reference.rounding_figures`; largest is raised."""
    wide, bits = _of_wide(values)
    narrow = _of_bytes(rounded, square=False)
    _rounding_kernel[(1,)](
        wide,
        bits,
        narrow,
        sums,
        largest.view(torch.int32),
        values.numel(),
        wide.shape[1],
        narrow.shape[1],
        BLOCK=PARTIALS,
        num_warps=8,
    )


def _of_wide(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 (3, programs) and int32 (programs,): what `_wide_kernel` writes."""
    launch = INTERPRETED if INTERPRETING else WIDE.pick(x)
    programs = min(triton.cdiv(x.numel(), launch.block), MAX_PROGRAMS)
    sums = torch.empty(3, programs, dtype=torch.float64, device=x.device)
    bits = torch.empty(programs, dtype=torch.int32, device=x.device)
    _wide_kernel[(programs,)](
        x, sums, bits, x.numel(), BLOCK=launch.block, num_warps=launch.num_warps
    )
    return sums, bits


def _of_bytes(q: torch.Tensor, square: bool) -> torch.Tensor:
    """float64 (3, programs): what `_byte_kernel` writes; squares are zeros unless asked for."""
    launch = INTERPRETED if INTERPRETING else BYTES
    programs = min(triton.cdiv(q.numel(), launch.block), MAX_PROGRAMS)
    sums = torch.empty(3, programs, dtype=torch.float64, device=q.device)
    _byte_kernel[(programs,)](
        q.view(torch.uint8),
        sums,
        q.numel(),
        E5M2=q.dtype == torch.float8_e5m2,
        SQUARE=square,
        BLOCK=launch.block,
        num_warps=launch.num_warps,
    )
    return sums
