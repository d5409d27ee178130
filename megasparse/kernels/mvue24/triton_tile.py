"""Functions for kernels on tiles of a gradient: PAIRS pairs of groups of 4 tokens by 64 channels.

A thread holds neighbouring channels of both groups of a pair. A group is a tuple: its four tokens
in float32, and a uint32 of their signs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from megasparse.kernels.device.float8 import e4m3_word, to_float8
from megasparse.kernels.device.groups import first_token, raise_flag
from megasparse.kernels.device.layout24 import crowded8, select8
from megasparse.kernels.dispatch import INTERPRETING
from megasparse.kernels.mvue24.triton_packed import packed8, sample, word8
from megasparse.kernels.mvue24.triton_sampler import draw, sample_scaled

# Of a grid's second dimension.
MOST_TILES = 65535


@dataclass(frozen=True)
class Launch:
    """Most pairs of groups (8 tokens) a program handles, 64 channels each, and its warps.

    registers: the most that a thread may have.
    """

    pairs: int
    num_warps: int
    registers: int

    def fitted(self, padded_tokens: int) -> tuple[int, dict[str, int]]:
        """Pairs that divide the tokens (a multiple of 8), and Triton's options; in the
        interpreter, which costs time per program and not per element, more of them."""
        pairs = 64 if INTERPRETING else self.pairs
        while padded_tokens % (8 * pairs):
            pairs //= 2
        return pairs, {"num_warps": self.num_warps, "maxnreg": self.registers}


def tiles(blocks: int, count: int) -> Iterator[tuple[tuple[int, int], int]]:
    """The grids of `count` tiles along the tokens, for each of `blocks`, and their first tiles."""
    for first in range(0, count, MOST_TILES):
        yield (blocks, min(count - first, MOST_TILES)), first


def parts_of_tiles(counts: Sequence[int], tile: int, device: torch.device) -> torch.Tensor:
    """int64 (tiles, 2): of each tile of tokens the first token of its part, and the part's tokens.

    Not to be changed: the next operand of the same parts gets the same table.

    Args:
        counts: tokens of the parts, one after the other; multiples of `tile`.
    """
    return _parts_of_tiles(tuple(counts), tile, device)


@functools.lru_cache(maxsize=128)
def _parts_of_tiles(counts: tuple[int, ...], tile: int, device: torch.device) -> torch.Tensor:
    length = torch.tensor(counts, dtype=torch.int64)
    parts = torch.stack([length.cumsum(0) - length, length], 1)
    table = torch.repeat_interleave(parts, length // tile, 0)
    return table.to(device, non_blocking=True)


def groups_of_parts(counts: Sequence[int], most: int) -> int:
    """Groups of 4 tokens of a program, at most `most`, a power of two, that divide all parts."""
    whole = math.gcd(*counts)
    while whole % (4 * most):
        most //= 2
    return most


@triton.jit
def load_token(ptrs, token, num_tokens, FULL: tl.constexpr):
    """Zeros after the last token; with FULL there is none after it."""
    if FULL:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=token < num_tokens, other=0.0)


@triton.jit
def step_of(padded_tokens, STRIDED: tl.constexpr):
    """int64: from a token of a group to the next."""
    if STRIDED:
        return tl.cast(padded_tokens // 4, tl.int64)
    else:
        return tl.full((), 1, tl.int64)


@triton.jit
def load_group(
    ptrs, stride, token, num_tokens, padded_tokens, STRIDED: tl.constexpr, FULL: tl.constexpr
):
    """The four tokens of each group.

    Args:
        ptrs: to the first ones.
        stride: from a token to its neighbour.
        token: the first ones' number, int64.
    """
    step = step_of(padded_tokens, STRIDED)
    stride = stride * step
    x0 = load_token(ptrs, token, num_tokens, FULL)
    x1 = load_token(ptrs + stride, token + step, num_tokens, FULL)
    x2 = load_token(ptrs + 2 * stride, token + 2 * step, num_tokens, FULL)
    x3 = load_token(ptrs + 3 * stride, token + 3 * step, num_tokens, FULL)
    return x0, x1, x2, x3


@triton.jit
def _store_token(ptrs, x, scale, token, num_tokens, E5M2: tl.constexpr, FULL: tl.constexpr):
    if FULL:
        tl.store(ptrs, to_float8(x * scale, E5M2))
    else:
        tl.store(ptrs, to_float8(x * scale, E5M2), mask=token < num_tokens)


@triton.jit
def store_rows(
    row_ptr,
    x,
    scale,
    group,
    channel,
    num_tokens,
    padded_tokens,
    row_stride,
    STRIDED: tl.constexpr,
    E5M2: tl.constexpr,
    FULL: tl.constexpr,
):
    """A group's tokens, quantized; those from `num_tokens` on do not exist, with FULL all do."""
    token = first_token(group, STRIDED)
    ptrs = row_ptr + token * row_stride + channel
    step = step_of(padded_tokens, STRIDED)
    stride = row_stride * step
    _store_token(ptrs, x[0], scale, token, num_tokens, E5M2, FULL)
    _store_token(ptrs + stride, x[1], scale, token + step, num_tokens, E5M2, FULL)
    _store_token(ptrs + 2 * stride, x[2], scale, token + 2 * step, num_tokens, E5M2, FULL)
    _store_token(ptrs + 3 * stride, x[3], scale, token + 3 * step, num_tokens, E5M2, FULL)


@triton.jit
def global_group(group, split, first_shift, second_shift, SHIFTED: tl.constexpr):
    """The number of a group over the whole, see `places.py`; without SHIFTED its local one."""
    if SHIFTED:
        return group + tl.where(group < split, first_shift, second_shift)
    else:
        return group


@triton.jit
def number_of(groups_ptr, group, split, first_shift, second_shift, SHIFTED: tl.constexpr):
    """What a group draws by: what `groups_ptr` (int64) says, else its number over the whole."""
    if groups_ptr is None:
        return global_group(group, split, first_shift, second_shift, SHIFTED)
    else:
        return tl.load(groups_ptr + group)


@triton.jit
def place_in_part(
    words_ptr,
    metadata_ptr,
    parts_ptr,
    tile,
    padded_tokens,
    width,
    TOKENS: tl.constexpr,
    RATIO: tl.constexpr,
):
    """Where the part of a tile has its words and metadata, its tile within it, its tokens.

    Args:
        metadata_ptr: with parts to where everything begins.
        parts_ptr: `parts_of_tiles`, of parts that are packed one after the other; None: one part.
        width: rows of the packed parts.
        TOKENS: of a tile.
        RATIO: bytes of values for a byte of metadata.
    """
    if parts_ptr is None:
        return words_ptr, metadata_ptr, tile, padded_tokens
    else:
        begin, length = tl.load(parts_ptr + 2 * tile), tl.load(parts_ptr + 2 * tile + 1)
        before = (RATIO + 1) * begin * (width // 8)
        metadata = metadata_ptr + before + RATIO * length * (width // 8)
        return words_ptr + before // 4, metadata, tile - begin // TOKENS, length


@triton.jit
def _bits(magnitude):
    """As integers, which are ordered as the magnitudes, NaN above all."""
    return magnitude.to(tl.int32, bitcast=True)


@triton.jit
def prune(x, scale, group, other, key, high, EXACT: tl.constexpr):
    """MVUE of a group in e4m3: a word and what `store_packed` wants of it, and the bits of the
    largest magnitudes before and after."""
    group = group.to(tl.uint32)
    if EXACT:
        word, _ = draw(x[0], group, other, key, high)
        sampled = sample(x[0], x[1], x[2], x[3], word)
        word, nonzero = word8(sampled, x[4], scale)
        most = tl.maximum(_bits(sampled[0]), _bits(sampled[5]))
        return word, nonzero, _bits(sampled[4]), most
    else:
        o0, o1, o2, o3, largest, most = sample_scaled(
            x[0], x[1], x[2], x[3], group, other, key, high, scale, False
        )
        word = e4m3_word(o0, o1, o2, o3)
        return word, crowded8(word), _bits(largest), _bits(most)


@triton.jit
def _pack(pruned0, pruned1, flag_ptr, EXACT: tl.constexpr):
    """Two pruned groups packed: the four bytes they keep (uint32), and their codes (uint8)."""
    if EXACT:
        return packed8(pruned0[0], pruned0[1], pruned1[0], pruned1[1])
    else:
        raise_flag(flag_ptr, ((pruned0[1] | pruned1[1]) >> 31).to(tl.int32))
        kept0, code0 = select8(pruned0[0])
        kept1, code1 = select8(pruned1[0])
        return (kept0 & 0xFFFF) | (kept1 << 16), (code0 | (code1 << 4)).to(tl.uint8)


@triton.jit
def store_packed(
    words_ptr,
    metadata_ptr,
    flag_ptr,
    pruned0,
    pruned1,
    first_row,
    tile,
    padded_tokens,
    EXACT: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """The packed tile of 64 channels from `first_row` (int64) on, of the groups of all pairs."""
    kept, code = _pack(pruned0, pruned1, flag_ptr, EXACT)
    # Row `channel` of the packed values has a word for each pair of groups.
    row = first_row + tl.arange(0, 64)[:, None]
    column = tile * PAIRS + tl.arange(0, PAIRS)[None, :]
    words = tl.trans(kept).to(tl.int32, bitcast=True)
    tl.store(words_ptr + row * (padded_tokens // 8) + column, words)
    byte = tl.reshape(code, (PAIRS // 8, 2, 4, 4, 2, 8))
    # (G, g8, gq, a, h, b) -> (G, a, b, gq, g8, h)
    byte = tl.permute(byte, (0, 3, 5, 2, 1, 4))
    offset = first_row * (padded_tokens // 8) + tile * (64 * PAIRS) + tl.arange(0, 64 * PAIRS)
    tl.store(metadata_ptr + offset, tl.reshape(byte, (64 * PAIRS,)))
