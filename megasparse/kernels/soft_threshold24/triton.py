"""S-STE's projection and its scale's two sums in one pass over the weight."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megasparse.kernels.groups import KINDS, Launch, Launches, group_words
from megasparse.kernels.groups.triton import (
    from_fp32,
    load_bits,
    magnitude,
    nan_limit,
    raise_flag,
    store_bits,
    to_fp32,
)

# In groups: 64 bytes a thread, loads and stores of 16 bytes.
LAUNCHES = Launches(wide=Launch(block=512, num_warps=4), narrow=Launch(block=1024, num_warps=4))


@triton.jit
def _project(bits, threshold, KIND: tl.constexpr):
    """Bits of sign(x) * max(|x| - threshold, 0), and |x|. Zero also where both are infinite."""
    x = to_fp32(magnitude(bits), KIND)
    shrunk = from_fp32(x - threshold, KIND) | (bits & -0x80000000)
    return tl.where(x > threshold, shrunk, 0), x


@triton.jit
def _products(projected, x, KIND: tl.constexpr):
    """|w s| and s^2: a weight and its projection have the same sign."""
    mask: tl.constexpr = 0x7FFFFFFF if KIND == "fp32" else 0x7FFF0000
    y = to_fp32(projected & mask, KIND)
    return x * y, y * y


@triton.jit
def _soft_threshold24_kernel(
    w,
    out,
    partial_sums,
    flag,
    groups,
    KIND: tl.constexpr,
    STORE: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    group = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = group < groups
    a, b, c, d = load_bits(w, group, live, KIND)
    size_a, size_b, size_c, size_d = magnitude(a), magnitude(b), magnitude(c), magnitude(d)
    # The second smallest magnitude.
    low_ab, high_ab = tl.minimum(size_a, size_b), tl.maximum(size_a, size_b)
    low_cd, high_cd = tl.minimum(size_c, size_d), tl.maximum(size_c, size_d)
    second = tl.minimum(tl.maximum(low_ab, low_cd), tl.minimum(high_ab, high_cd))
    threshold = to_fp32(second, KIND)
    a, x_a = _project(a, threshold, KIND)
    b, x_b = _project(b, threshold, KIND)
    c, x_c = _project(c, threshold, KIND)
    d, x_d = _project(d, threshold, KIND)
    if STORE:
        store_bits(out, group, live, a, b, c, d, KIND)
    if SUMS:  # entries that are not live were loaded as zero
        dot_a, square_a = _products(a, x_a, KIND)
        dot_b, square_b = _products(b, x_b, KIND)
        dot_c, square_c = _products(c, x_c, KIND)
        dot_d, square_d = _products(d, x_d, KIND)
        tl.store(partial_sums + 2 * pid, tl.sum((dot_a + dot_b) + (dot_c + dot_d)))
        squares = (square_a + square_b) + (square_c + square_d)
        tl.store(partial_sums + 2 * pid + 1, tl.sum(squares))
    raise_flag(flag, (tl.maximum(high_ab, high_cd) > nan_limit(KIND)).to(tl.int32))


def soft_threshold24(w: torch.Tensor, flag: torch.Tensor) -> torch.Tensor:
    """`reference.soft_threshold24`; sets `flag` to 1 when `w` holds a NaN."""
    return _launch(w, flag, store=True, sums=False)[0]


def scale_sums(w: torch.Tensor, flag: torch.Tensor) -> torch.Tensor:
    """`reference.scale_sums`, without writing the projection."""
    return _launch(w, flag, store=False, sums=True)[1]


def soft_threshold24_with_sums(
    w: torch.Tensor, flag: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The projection and float64 (2,): <W, S>, <S, S>, in the same pass.

    fp32 within a program, float64 over the programs, both in a fixed order: the same bits each
    time. Squares leave fp32 below 1e-19 and above 1e19.
    """
    return _launch(w, flag, store=True, sums=True)


def _launch(
    w: torch.Tensor, flag: torch.Tensor, *, store: bool, sums: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The projection (empty without `store`) and the sums (meaningless without `sums`)."""
    launch = LAUNCHES.pick(w)
    out = torch.empty(w.shape if store else 0, dtype=w.dtype, device=w.device)
    groups = w.numel() // 4
    programs = triton.cdiv(groups, launch.block)
    partial = torch.empty((programs if sums else 0, 2), dtype=torch.float32, device=w.device)
    if groups:
        _soft_threshold24_kernel[(programs,)](
            group_words(w),
            out.view(-1).view(torch.int64),
            partial,
            flag,
            groups,
            KIND=KINDS[w.dtype],
            STORE=store,
            SUMS=sums,
            BLOCK=launch.block,
            num_warps=launch.num_warps,
        )
    return out, partial.sum(0, dtype=torch.float64)
