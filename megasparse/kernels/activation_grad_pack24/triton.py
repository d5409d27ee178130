"""Triton kernel of `activation_grad_pack24`: dy and [gate | x] are read once, along channels.

A program takes 64 channels of both halves, as dZ of the fused projection has two for each of dy, by
8 * PAIRS tokens. It computes both gradients, rounds them to 16 bits, two tokens in a register, and
does with the gate's and then with x's what `grad_pack24` does with a gradient that it loads. An
activation that is not gated has the gate's alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megasparse.kernels.activation.kinds import Activation, is_gated
from megasparse.kernels.activation_grad_pack24.triton_gradients import two_groups
from megasparse.kernels.device.float8 import product_factor, raise_above
from megasparse.kernels.device.groups import to_fp32
from megasparse.kernels.factors import Lacking
from megasparse.kernels.float8 import E5M2, whole_tiles
from megasparse.kernels.grad_pack24.quantization import Quantization
from megasparse.kernels.mvue24.places import Places, group_shifts
from megasparse.kernels.mvue24.triton_packed import signs_of_pairs
from megasparse.kernels.mvue24.triton_sampler import seed_arguments, seed_of
from megasparse.kernels.mvue24.triton_tile import (
    Launch,
    global_group,
    prune,
    store_packed,
    store_rows,
    tiles,
)
from megasparse.kernels.packed24 import Packed24
from megasparse.kernels.random import SeedLike

LAUNCH = Launch(pairs=8, num_warps=4, registers=128)


@triton.jit
def _unpacked(pair01, pair23, KIND: tl.constexpr):
    """A group as the functions of `mvue24.triton_tile` take it."""
    low, high = pair01.to(tl.int32, bitcast=True), pair23.to(tl.int32, bitcast=True)
    return (
        to_fp32(low << 16, KIND),
        to_fp32(low & -0x10000, KIND),
        to_fp32(high << 16, KIND),
        to_fp32(high & -0x10000, KIND),
        signs_of_pairs(pair01, pair23),
    )


@triton.jit
def _store_rows(
    row_ptr,
    z0,
    z1,
    scale,
    pair,
    channel,
    padded_tokens,
    row_stride,
    STRIDED: tl.constexpr,
    E5M2: tl.constexpr,
):
    """Both groups of each pair; tokens up to the padded number exist in the rows."""
    group, last = 2 * pair, padded_tokens
    store_rows(row_ptr, z0, scale, group, channel, 0, last, row_stride, STRIDED, E5M2, True)
    store_rows(row_ptr, z1, scale, group + 1, channel, 0, last, row_stride, STRIDED, E5M2, True)


@triton.jit
def _found(amax_ptr):
    """What is at `amax_ptr` before this program, if there is one."""
    if amax_ptr is None:
        return 0
    else:
        return tl.load(amax_ptr)


@triton.jit(
    do_not_specialize=[
        "key", "high", "first_tile", "gate_other", "x_other", "split", "first_shift",
        "second_shift",
    ]
)  # fmt: skip
def _activation_grad_pack24_kernel(
    dy_ptr,
    fused_ptr,
    row_ptr,
    words_ptr,
    metadata_ptr,
    row_scale_ptr,
    packed_scale_ptr,
    scale_inv_ptr,
    row_amax_ptr,
    packed_amax_ptr,
    dy_a_ptr,
    dy_b_ptr,
    dy_applied_inv,
    a_ptr,
    b_ptr,
    applied_inv,
    flag_ptr,
    sums_ptr,
    seed_ptr,
    key,
    high,
    num_tokens,
    padded_tokens,
    first_tile,
    dy_stride,
    fused_stride,
    width,
    gate_other,
    x_other,
    split,
    first_shift,
    second_shift,
    GATED: tl.constexpr,
    GELU: tl.constexpr,
    SHIFTED: tl.constexpr,
    EXACT: tl.constexpr,
    STRIDED: tl.constexpr,
    E5M2: tl.constexpr,
    PAIRS: tl.constexpr,
    FULL: tl.constexpr,
):
    block, tile = tl.program_id(0), first_tile + tl.program_id(1)
    pair = tile * PAIRS + tl.arange(0, PAIRS)[:, None]
    column = block * 64 + tl.arange(0, 64)[None, :]
    KIND: tl.constexpr = "bf16" if dy_ptr.dtype.element_ty == tl.bfloat16 else "fp16"
    dy_stride, fused_stride = tl.cast(dy_stride, tl.int64), tl.cast(fused_stride, tl.int64)
    width = tl.cast(width, tl.int64)
    key, high = seed_of(seed_ptr, key, high)
    row_amax, packed_amax = _found(row_amax_ptr), _found(packed_amax_ptr)
    dy_factor = product_factor(dy_a_ptr, dy_b_ptr, dy_applied_inv)
    factors = (dy_factor, product_factor(a_ptr, b_ptr, applied_inv))
    packed_scale = tl.load(packed_scale_ptr)
    if (block == 0) & (tile == 0):
        tl.store(scale_inv_ptr, tl.div_rn(1.0, packed_scale))
    scale = 1.0
    if row_ptr is not None:
        scale = tl.load(row_scale_ptr)
    a01, a23, x01, x23, b01, b23, y01, y23 = two_groups(
        dy_ptr,
        fused_ptr,
        2 * pair,
        column,
        width,
        num_tokens,
        padded_tokens,
        dy_stride,
        fused_stride,
        factors,
        GATED,
        GELU,
        STRIDED,
        FULL,
    )
    PARTS: tl.constexpr = 2 if GATED else 1
    largest, most = tl.zeros_like(a01).to(tl.int32), tl.zeros_like(a01).to(tl.int32)
    group0 = global_group(2 * pair, split, first_shift, second_shift, SHIFTED)
    group1 = global_group(2 * pair + 1, split, first_shift, second_shift, SHIFTED)
    place, first_row = gate_other.to(tl.uint32), block.to(tl.int64) * 64
    # A loop on purpose: unrolled, the program is twice as long and spills registers.
    for _ in range(PARTS):
        z0, z1 = _unpacked(a01, a23, KIND), _unpacked(b01, b23, KIND)
        if row_ptr is not None:
            channel = first_row + tl.arange(0, 64)[None, :]
            _store_rows(
                row_ptr, z0, z1, scale, pair, channel, padded_tokens, PARTS * width, STRIDED, E5M2
            )
        if sums_ptr is not None:
            total = ((z0[0] + z0[1]) + (z0[2] + z0[3])) + ((z1[0] + z1[1]) + (z1[2] + z1[3]))
            at = tile.to(tl.int64) * (PARTS * width) + first_row + tl.arange(0, 64)[None, :]
            tl.store(sums_ptr + at, tl.sum(total, axis=0, keep_dims=True))
        other = column.to(tl.uint32) + place
        pruned0 = prune(z0, packed_scale, group0, other, key, high, EXACT)
        pruned1 = prune(z1, packed_scale, group1, other, key, high, EXACT)
        largest = tl.maximum(largest, tl.maximum(pruned0[2], pruned1[2]))
        most = tl.maximum(most, tl.maximum(pruned0[3], pruned1[3]))
        store_packed(
            words_ptr,
            metadata_ptr,
            flag_ptr,
            pruned0,
            pruned1,
            first_row,
            tile,
            padded_tokens,
            EXACT,
            PAIRS,
        )
        a01, a23, b01, b23 = x01, x23, y01, y23
        place, first_row = x_other.to(tl.uint32), first_row + width
    if row_amax_ptr is not None:
        raise_above(row_amax_ptr, largest, row_amax)
    if packed_amax_ptr is not None:
        raise_above(packed_amax_ptr, most, packed_amax)


def activation_grad_pack24(
    dy: torch.Tensor,
    fused: torch.Tensor,
    activation: Activation,
    seed: SeedLike,
    channel_places: tuple[int, ...],
    token_places: Places,
    exact: bool,
    strided: bool,
    how: Quantization,
    dy_factors: Lacking,
    factors: Lacking,
) -> tuple[torch.Tensor | None, Packed24]:
    """See reference.py; raises amaxes and flag of `how`."""
    dy, fused = (t if t.stride(1) == 1 else t.contiguous() for t in (dy, fused))
    tokens, width = dy.shape
    row, packed, flag = how.new_outputs(fused, whole_tiles(tokens))
    padded = packed.shape[1]
    pairs, options = LAUNCH.fitted(padded)
    sums = how.new_sums(padded // (8 * pairs), fused.shape[1])
    seed_ptr, key, high = seed_arguments(seed)
    shifts = group_shifts(token_places)
    for grid, first_tile in tiles(width // 64, padded // (8 * pairs)):
        with torch.cuda.device_of(dy):  # Triton launches on the current device
            _activation_grad_pack24_kernel[grid](
                dy,
                fused,
                None if row is None else row.view(torch.int8),
                packed.values.view(torch.int32),
                packed.metadata,
                how.row_scale,
                how.packed_scale,
                packed.scale,
                None if how.row_amax is None else how.row_amax.view(torch.int32),
                None if how.packed_amax is None else how.packed_amax.view(torch.int32),
                *dy_factors,
                *factors,
                flag,
                sums,
                seed_ptr,
                key,
                high,
                tokens,
                padded,
                first_tile,
                dy.stride(0),
                fused.stride(0),
                width,
                channel_places[0],
                channel_places[-1],
                *(shifts or (0, 0, 0)),
                GATED=is_gated(activation),
                GELU=activation != "swiglu",
                SHIFTED=shifts is not None,
                EXACT=exact,
                STRIDED=strided,
                E5M2=how.row_dtype == E5M2,
                PAIRS=pairs,
                FULL=tokens == padded,
                enable_fp_fusion=False,
                **options,
            )
    how.add_sums(sums)
    return row, packed
