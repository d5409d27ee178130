"""S-STE's projection and its scale's two sums in one pass over the weight."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megasparse.kernels.device.groups import (
    from_fp32,
    load_bits,
    magnitude,
    nan_limit,
    raise_flag,
    rounded,
    rounded_pair,
    store_bits,
    to_fp32,
)
from megasparse.kernels.dispatch import INTERPRETING
from megasparse.kernels.launches import KINDS, Launch, Launches, group_words

# In groups: 64 bytes a thread and step, loads and stores of 16 bytes.
LAUNCHES = Launches(wide=Launch(block=512, num_warps=4), narrow=Launch(block=1024, num_warps=4))
# Blocks a program walks over when it sums: the sum over its threads costs as much as one of them.
SUM_STEPS = 4


@triton.jit
def _project(bits, threshold, KIND: tl.constexpr):
    """Bits of sign(x) * max(|x| - threshold, 0). Zero also where both are infinite."""
    x = to_fp32(magnitude(bits), KIND)
    shrunk = from_fp32(x - threshold, KIND) | (bits & -0x80000000)
    return tl.where(x > threshold, shrunk, 0)


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
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    dots = tl.zeros((BLOCK,), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    worst = tl.zeros((BLOCK,), tl.int32)
    for step in range(STEPS):
        group = (pid.to(tl.int64) * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        live = group < groups
        a, b, c, d = load_bits(w, group, live, KIND)
        size_a, size_b, size_c, size_d = magnitude(a), magnitude(b), magnitude(c), magnitude(d)
        low_ab, high_ab = tl.minimum(size_a, size_b), tl.maximum(size_a, size_b)
        low_cd, high_cd = tl.minimum(size_c, size_d), tl.maximum(size_c, size_d)
        # The second, third and fourth smallest magnitudes are those of the two in the middle and
        # the largest one; only the last two have a projection.
        middle0, middle1 = tl.maximum(low_ab, low_cd), tl.minimum(high_ab, high_cd)
        largest = tl.maximum(high_ab, high_cd)
        threshold = to_fp32(tl.minimum(middle0, middle1), KIND)
        worst = tl.maximum(worst, largest)
        if STORE:
            a, b = _project(a, threshold, KIND), _project(b, threshold, KIND)
            c, d = _project(c, threshold, KIND), _project(d, threshold, KIND)
            store_bits(out, group, live, a, b, c, d, KIND)
        if SUMS:  # entries that are not live were loaded as zero
            third, fourth = to_fp32(tl.maximum(middle0, middle1), KIND), to_fp32(largest, KIND)
            s_third = rounded(third - threshold, KIND)
            s_fourth = rounded(fourth - threshold, KIND)
            dots += third * s_third + fourth * s_fourth
            squares += s_third * s_third + s_fourth * s_fourth
    if SUMS:
        tl.store(partial_sums + 2 * pid, tl.sum(dots))
        tl.store(partial_sums + 2 * pid + 1, tl.sum(squares))
    raise_flag(flag, (worst > nan_limit(KIND)).to(tl.int32))


@triton.jit
def _shrunk_pair(x, y, threshold, KIND: tl.constexpr):
    """`_project` on float32."""
    s, t = rounded_pair(tl.abs(x) - threshold, tl.abs(y) - threshold, KIND)
    s, t = tl.where(x < 0, -s, s), tl.where(y < 0, -t, t)
    return tl.where(tl.abs(x) > threshold, s, 0.0), tl.where(tl.abs(y) > threshold, t, 0.0)


@triton.jit
def soft_threshold_group(a, b, c, d, KIND: tl.constexpr):
    """The projection of four float32 that are KIND's, rounded to it, and where one is NaN."""
    low_ab = tl.minimum(tl.abs(a), tl.abs(b))
    high_ab = tl.maximum(tl.abs(a), tl.abs(b), propagate_nan=tl.PropagateNan.ALL)
    low_cd = tl.minimum(tl.abs(c), tl.abs(d))
    high_cd = tl.maximum(tl.abs(c), tl.abs(d), propagate_nan=tl.PropagateNan.ALL)
    threshold = tl.minimum(tl.maximum(low_ab, low_cd), tl.minimum(high_ab, high_cd))
    a, b = _shrunk_pair(a, b, threshold, KIND)
    c, d = _shrunk_pair(c, d, threshold, KIND)
    return a, b, c, d, (high_ab != high_ab) | (high_cd != high_cd)


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
    steps = SUM_STEPS if sums and not INTERPRETING else 1
    programs = triton.cdiv(groups, launch.block * steps)
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
            STEPS=steps,
            BLOCK=launch.block,
            num_warps=launch.num_warps,
        )
    return out, partial.sum(0, dtype=torch.float64)
