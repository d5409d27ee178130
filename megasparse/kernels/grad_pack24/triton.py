"""Triton kernel of `grad_pack24`: dZ is read once, coalesced along channels, or computed.

A program takes 64 channels (the height of a metadata block) by 8 * PAIRS tokens. A thread holds
eight channels of eight tokens, two groups: it writes eight bytes of the row-major copy at a time,
and only what the groups keep, one 32-bit word for both, and their codes move between threads.

dZ of a fused projection [gate | x] is computed from what its gated activation's backward pass
reads. Programs of the two halves of a channel are neighbours, so they share what they read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from megasparse.kernels.dispatch import INTERPRETING
from megasparse.kernels.float8 import E5M2
from megasparse.kernels.float8.triton import e4m3_word, raise_amax, to_float8
from megasparse.kernels.gated_activation.triton import gated, grad_gate
from megasparse.kernels.groups.triton import raise_flag, rounded_pair, widen
from megasparse.kernels.layout24.triton import crowded8, select8
from megasparse.kernels.mvue24.triton import _seed_arguments, draw, sample_scaled
from megasparse.kernels.mvue_words.triton import packed8, sample, signs16, signs_of, word8
from megasparse.kernels.packed24 import Packed24
from megasparse.kernels.random import SeedLike


@dataclass(frozen=True)
class Launch:
    """Most pairs of groups (8 tokens) a program handles, 64 channels each, and its warps.

    registers: the most that a thread may have; five programs fit on an SM.
    """

    pairs: int
    num_warps: int
    registers: int


LAUNCH = Launch(pairs=16, num_warps=4, registers=96)
GATED = Launch(pairs=16, num_warps=4, registers=128)
# The interpreter costs time per program, not per element.
INTERPRETED = Launch(pairs=64, num_warps=4, registers=96)


# Of a grid's second dimension.
MOST_TILES = 65535


@triton.jit
def _bits(magnitude):
    """As integers, which are ordered as the magnitudes, NaN above all."""
    return magnitude.to(tl.int32, bitcast=True)


@triton.jit
def _load(dz_ptr, group, channel, num_tokens, dz_stride):
    """The four tokens of a group, zeros after the last token; then their signs."""
    token = group.to(tl.int64) * 4
    ptrs = dz_ptr + token * dz_stride + channel
    x0 = tl.load(ptrs, mask=token < num_tokens, other=0.0)
    x1 = tl.load(ptrs + dz_stride, mask=token + 1 < num_tokens, other=0.0)
    x2 = tl.load(ptrs + 2 * dz_stride, mask=token + 2 < num_tokens, other=0.0)
    x3 = tl.load(ptrs + 3 * dz_stride, mask=token + 3 < num_tokens, other=0.0)
    return widen(x0), widen(x1), widen(x2), widen(x3), signs16(x0, x1, x2, x3)


@triton.jit
def _half_gradient(dy_ptrs, fused_ptrs, width, half, live):
    """The gradient of the gate (half 0) or of x (half 1) at `fused_ptrs`, which point to gates."""
    dy = widen(tl.load(dy_ptrs, mask=live, other=0.0))
    gate = widen(tl.load(fused_ptrs, mask=live, other=0.0))
    if half == 0:
        x = widen(tl.load(fused_ptrs + width, mask=live, other=0.0))
        result = grad_gate(dy, x, gate, False)
    else:
        result = gated(dy, gate, False)
    return result


@triton.jit
def _compute(dy_ptr, fused_ptr, group, column, width, half, num_tokens, dy_stride, fused_stride):
    """What `_load` gives, where dZ is the gradient of swiglu(`fused`); width: of a half."""
    token = group.to(tl.int64) * 4
    dy, fused = dy_ptr + token * dy_stride + column, fused_ptr + token * fused_stride + column
    x0 = _half_gradient(dy, fused, width, half, token < num_tokens)
    dy, fused = dy + dy_stride, fused + fused_stride
    x1 = _half_gradient(dy, fused, width, half, token + 1 < num_tokens)
    dy, fused = dy + dy_stride, fused + fused_stride
    x2 = _half_gradient(dy, fused, width, half, token + 2 < num_tokens)
    dy, fused = dy + dy_stride, fused + fused_stride
    x3 = _half_gradient(dy, fused, width, half, token + 3 < num_tokens)
    KIND: tl.constexpr = "bf16" if dy_ptr.dtype.element_ty == tl.bfloat16 else "fp16"
    x0, x1 = rounded_pair(x0, x1, KIND)
    x2, x3 = rounded_pair(x2, x3, KIND)
    return x0, x1, x2, x3, signs_of(x0, x1, x2, x3)


@triton.jit
def _store_rows(row_ptr, x, scale, group, channel, num_tokens, row_stride, E5M2: tl.constexpr):
    token = group.to(tl.int64) * 4
    ptrs = row_ptr + token * row_stride + channel
    tl.store(ptrs, to_float8(x[0] * scale, E5M2), mask=token < num_tokens)
    tl.store(ptrs + row_stride, to_float8(x[1] * scale, E5M2), mask=token + 1 < num_tokens)
    tl.store(ptrs + 2 * row_stride, to_float8(x[2] * scale, E5M2), mask=token + 2 < num_tokens)
    tl.store(ptrs + 3 * row_stride, to_float8(x[3] * scale, E5M2), mask=token + 3 < num_tokens)


@triton.jit
def _prune(x, scale, group, other, seed_ptr, key, high, EXACT: tl.constexpr):
    """MVUE of a group in e4m3: a word and what `_pack` wants of it, and the largest magnitudes
    before and after."""
    group = group.to(tl.uint32)
    if EXACT:
        word, _ = draw(x[0], group, other, seed_ptr, key, high)
        sampled = sample(x[0], x[1], x[2], x[3], word)
        word, nonzero = word8(sampled, x[4], scale)
        return word, nonzero, _bits(sampled[4]), tl.maximum(_bits(sampled[0]), _bits(sampled[5]))
    else:
        o0, o1, o2, o3, largest, most = sample_scaled(
            x[0], x[1], x[2], x[3], group, other, seed_ptr, key, high, scale, False
        )
        word = e4m3_word(o0, o1, o2, o3)
        return word, crowded8(word), _bits(largest), _bits(most)


@triton.jit
def _pack(word0, extra0, word1, extra1, flag_ptr, EXACT: tl.constexpr):
    """Two pruned groups packed: the four bytes they keep (uint32), and their codes (uint8)."""
    if EXACT:
        return packed8(word0, extra0, word1, extra1)
    else:
        raise_flag(flag_ptr, ((extra0 | extra1) >> 31).to(tl.int32))
        kept0, code0 = select8(word0)
        kept1, code1 = select8(word1)
        return (kept0 & 0xFFFF) | (kept1 << 16), (code0 | (code1 << 4)).to(tl.uint8)


@triton.jit(do_not_specialize=["key", "high", "first_tile", "first_other", "second_other"])
def _grad_pack24_kernel(
    dz_ptr,
    fused_ptr,
    row_ptr,
    words_ptr,
    metadata_ptr,
    row_scale_ptr,
    packed_scale_ptr,
    inverse_ptr,
    row_amax_ptr,
    packed_amax_ptr,
    flag_ptr,
    seed_ptr,
    key,
    high,
    num_tokens,
    padded_tokens,
    first_tile,
    dz_stride,
    fused_stride,
    row_stride,
    first_channel,
    first_other,
    second_other,
    EXACT: tl.constexpr,
    E5M2: tl.constexpr,
    PAIRS: tl.constexpr,
):
    # No division here: each would cost as much as a group of four gradients.
    block_row, tile = tl.program_id(0), first_tile + tl.program_id(1)
    pair = tile * PAIRS + tl.arange(0, PAIRS)[:, None]
    # Where the channels lie in dz, and in the whole layer.
    column = block_row * 64 + tl.arange(0, 64)[None, :]
    other = column.to(tl.uint32) + first_other.to(tl.uint32)
    half, width, rows = 0, 32 * tl.num_programs(0).to(tl.int64), num_tokens
    if fused_ptr is not None:
        rows = padded_tokens
        half = block_row % 2
        block_row = block_row // 2
        column = block_row * 64 + tl.arange(0, 64)[None, :]
        place = tl.where(half == 0, first_other, second_other)
        other = column.to(tl.uint32) + place.to(tl.uint32)
        block_row += half * (tl.num_programs(0) // 2)
    column += first_channel
    channel = first_channel + block_row * 64 + tl.arange(0, 64)[None, :]
    dz_stride, row_stride = tl.cast(dz_stride, tl.int64), tl.cast(row_stride, tl.int64)
    fused_stride = tl.cast(fused_stride, tl.int64)
    packed_scale = tl.load(packed_scale_ptr)
    tl.store(inverse_ptr, tl.div_rn(1.0, packed_scale), mask=(block_row == 0) & (tile == 0))
    scale = 1.0
    if row_ptr is not None:
        scale = tl.load(row_scale_ptr)
    # Loads and stores keep this order; the second group's loads pass the first one's arithmetic.
    if fused_ptr is None:
        x = _load(dz_ptr, 2 * pair, column, num_tokens, dz_stride)
    else:
        x = _compute(
            dz_ptr, fused_ptr, 2 * pair, column, width, half, num_tokens, dz_stride, fused_stride
        )
    if row_ptr is not None:
        _store_rows(row_ptr, x, scale, 2 * pair, channel, rows, row_stride, E5M2)
    word, extra, largest, most = _prune(
        x, packed_scale, 2 * pair, other, seed_ptr, key, high, EXACT
    )
    pair1 = 2 * pair + 1
    if fused_ptr is None:
        x1 = _load(dz_ptr, pair1, column, num_tokens, dz_stride)
    else:
        x1 = _compute(
            dz_ptr, fused_ptr, pair1, column, width, half, num_tokens, dz_stride, fused_stride
        )
    if row_ptr is not None:
        _store_rows(row_ptr, x1, scale, pair1, channel, rows, row_stride, E5M2)
    word1, extra1, largest1, most1 = _prune(
        x1, packed_scale, pair1, other, seed_ptr, key, high, EXACT
    )
    if row_amax_ptr is not None:
        raise_amax(row_amax_ptr, tl.maximum(largest, largest1))
    if packed_amax_ptr is not None:
        raise_amax(packed_amax_ptr, tl.maximum(most, most1))
    kept, code = _pack(word, extra, word1, extra1, flag_ptr, EXACT)
    # Row `channel` of the packed values has a word for each pair of groups.
    row = first_channel + block_row.to(tl.int64) * 64 + tl.arange(0, 64)[:, None]
    column = tile * PAIRS + tl.arange(0, PAIRS)[None, :]
    words = tl.trans(kept).to(tl.int32, bitcast=True)
    tl.store(words_ptr + row * (padded_tokens // 8) + column, words)
    byte = tl.reshape(code, (PAIRS // 8, 2, 4, 4, 2, 8))
    # (G, g8, gq, a, h, b) -> (G, a, b, gq, g8, h)
    byte = tl.permute(byte, (0, 3, 5, 2, 1, 4))
    start = (first_channel // 64 + block_row).to(tl.int64) * 8 * padded_tokens
    offset = start + tile * (64 * PAIRS) + tl.arange(0, 64 * PAIRS)
    tl.store(metadata_ptr + offset, tl.reshape(byte, (64 * PAIRS,)))


def grad_pack24(
    dz: torch.Tensor,
    seed: SeedLike,
    channels: tuple[tuple[int, int, int], ...],
    exact: bool,
    scales: tuple[torch.Tensor | None, torch.Tensor],
    row: torch.Tensor | None,
    packed: Packed24,
    maxima: tuple[torch.Tensor | None, torch.Tensor | None],
    flag: torch.Tensor,
) -> None:
    """See reference.py."""
    if dz.stride(1) != 1:
        dz = dz.contiguous()
    outputs = (row, packed, maxima, flag)
    for start, place, length in channels:
        _launch(LAUNCH, dz, None, seed, (start, length, place, 0), exact, scales, outputs)


def swiglu_grad_pack24(
    dy: torch.Tensor,
    fused: torch.Tensor,
    seed: SeedLike,
    places: tuple[int, int],
    exact: bool,
    scales: tuple[torch.Tensor | None, torch.Tensor],
    row: torch.Tensor | None,
    packed: Packed24,
    maxima: tuple[torch.Tensor | None, torch.Tensor | None],
    flag: torch.Tensor,
) -> None:
    """See reference.py."""
    dy, fused = (t if t.stride(1) == 1 else t.contiguous() for t in (dy, fused))
    outputs = (row, packed, maxima, flag)
    _launch(GATED, dy, fused, seed, (0, fused.shape[1], *places), exact, scales, outputs)


def _launch(
    launch: Launch,
    dz: torch.Tensor,
    fused: torch.Tensor | None,
    seed: SeedLike,
    section: tuple[int, int, int, int],
    exact: bool,
    scales: tuple[torch.Tensor | None, torch.Tensor],
    outputs: tuple[
        torch.Tensor | None,
        Packed24,
        tuple[torch.Tensor | None, torch.Tensor | None],
        torch.Tensor,
    ],
) -> None:
    """section: first channel, their number, and the places of the first and of the second half."""
    row, packed, maxima, flag = outputs
    (start, length, *places), padded = section, packed.shape[1]
    launch = INTERPRETED if INTERPRETING else launch
    pairs = launch.pairs
    while padded % (8 * pairs):
        pairs //= 2
    seed_ptr, key, high = _seed_arguments(seed)
    row_amax, packed_amax = (None if amax is None else amax.view(torch.int32) for amax in maxima)
    tiles = padded // (8 * pairs)
    with torch.cuda.device_of(dz):  # Triton launches on the current device
        for first in range(0, tiles, MOST_TILES):
            _grad_pack24_kernel[(length // 64, min(tiles - first, MOST_TILES))](
                dz,
                fused,
                None if row is None else row.view(torch.int8),
                packed.values.view(torch.int32),
                packed.metadata,
                *scales,
                packed.scale,
                row_amax,
                packed_amax,
                flag,
                seed_ptr,
                key,
                high,
                dz.shape[0],
                padded,
                first,
                dz.stride(0),
                0 if fused is None else fused.stride(0),
                packed.shape[0],
                start,
                *places,
                EXACT=exact,
                E5M2=row is not None and row.dtype == E5M2,
                PAIRS=pairs,
                num_warps=launch.num_warps,
                maxnreg=launch.registers,
                enable_fp_fusion=False,
            )
