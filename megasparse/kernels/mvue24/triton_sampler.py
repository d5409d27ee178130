"""Functions for kernels: the draws of reference.py; exact magnitudes are equal bit for bit.

Fused multiply-adds are off in every kernel that samples: the definition rounds every product and
sum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megasparse.kernels.device.groups import larger, smaller
from megasparse.kernels.device.philox import philox2x32, uniform24
from megasparse.kernels.dispatch import INTERPRETING
from megasparse.kernels.mvue24.reference import SCALE_DOWN, SCALE_UP, SMALL, TINY
from megasparse.kernels.random import SeedLike, seed_words

_SMALL = tl.constexpr(SMALL)
_SCALE_UP = tl.constexpr(SCALE_UP)
_SCALE_DOWN = tl.constexpr(SCALE_DOWN)
_TINY = tl.constexpr(TINY)
_INTERPRETING = tl.constexpr(INTERPRETING)


@triton.jit
def threshold(u, total):
    """u * total, but below a positive total; see reference.py."""
    below = (total.to(tl.int32, bitcast=True) - 1).to(tl.float32, bitcast=True)
    return tl.minimum(u * total, below)


@triton.jit
def _exact(a0, a1, a2, a3, word, scale):
    """`reference.exact_magnitudes`, line by line; times `scale`; then the largest of the group
    before and after pruning, both unscaled: what is kept is `step`, or at the largest more.
    """
    smaller01, larger01 = smaller(a0, a1), larger(a0, a1)
    smaller23, larger23 = smaller(a2, a3), larger(a2, a3)
    middle, largest = smaller(larger01, larger23), larger(larger01, larger23)
    c1 = smaller01 + smaller23
    r = c1 + middle
    step = (r + smaller(largest, r)) * 0.5
    t = threshold(uniform24(word), step)
    first0, first1 = smaller01 > t, c1 > t
    second1, second2 = c1 - step > t, r - step > t
    most = larger(largest, step)
    kept = tl.where(second2, step, most)
    step, most = step * scale, most * scale
    v_smaller01 = tl.where(first0, step, 0.0)
    v_smaller23 = tl.where((first1 ^ first0) | second1, step, 0.0)
    v_middle = tl.where(first1, tl.where(second2 ^ second1, step, 0.0), step)
    v_largest = tl.where(second2, 0.0, most)
    winner01, winner0, winner2 = larger01 >= larger23, a0 >= a1, a2 >= a3
    v01 = tl.where(winner01, v_largest, v_middle)
    v23 = tl.where(winner01, v_middle, v_largest)
    o0, o1 = tl.where(winner0, v01, v_smaller01), tl.where(winner0, v_smaller01, v01)
    o2, o3 = tl.where(winner2, v23, v_smaller23), tl.where(winner2, v_smaller23, v23)
    return o0, o1, o2, o3, largest, kept


@triton.jit
def reciprocal(x):
    """1 / x within 1 ulp by the GPU's one instruction; it takes subnormals for zero."""
    if _INTERPRETING:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _approximate(a0, a1, a2, a3, word0, word1):
    """`reference.approximate_magnitudes`; reciprocals are the GPU's, all four magnitudes are made.

    Selections and comparisons run at half the rate of sums and products, so the two kept are
    selected last.
    """
    sum_all = a0 + a1 + a2 + a3
    scale = tl.where(sum_all < _SMALL, _SCALE_UP, _SCALE_DOWN)
    a0, a1, a2, a3 = a0 * scale, a1 * scale, a2 * scale, a3 * scale
    low, high = a0 + a1, a2 + a3
    c2 = low + a2
    t = uniform24(word0) * (c2 + a3)
    above1 = low > t
    f0 = a0 > t
    f1 = above1 & (f0 == 0)
    f2 = (c2 > t) & (above1 == 0)
    f3 = (c2 > t) == 0
    e0 = tl.where(f0, 0.0, a0)
    e1 = e0 + tl.where(f1, 0.0, a1)
    e2 = e1 + tl.where(f2, 0.0, a2)
    t = uniform24(word1) * (e2 + tl.where(f3, 0.0, a3))
    again1 = e1 > t
    s0 = e0 > t
    s1 = again1 & (s0 == 0)
    s2 = (e2 > t) & (again1 == 0)
    s3 = (e2 > t) == 0
    low, high = low + _TINY, high + _TINY
    q0, q1 = a0 * reciprocal(a1 + high), a1 * reciprocal(a0 + high)
    q2, q3 = a2 * reciprocal(low + a3), a3 * reciprocal(low + a2)
    q_low, q_high = 1.0 + (q0 + q1), 1.0 + (q2 + q3)
    o0 = tl.where(f0 | s0, sum_all * reciprocal(q1 + q_high), 0.0)
    o1 = tl.where(f1 | s1, sum_all * reciprocal(q0 + q_high), 0.0)
    o2 = tl.where(f2 | s2, sum_all * reciprocal(q_low + q3), 0.0)
    o3 = tl.where(f3 | s3, sum_all * reciprocal(q_low + q2), 0.0)
    return o0, o1, o2, o3


@triton.jit
def _signed(magnitude, x):
    """A magnitude with the sign of x: one instruction where the compiler may make two."""
    if _INTERPRETING:
        sign = x.to(tl.uint32, bitcast=True) & 0x80000000
        return (magnitude.to(tl.uint32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    else:
        return tl.inline_asm_elementwise(
            "copysign.f32 $0, $2, $1;", "=f,f,f", [magnitude, x], tl.float32, True, 1
        )


@triton.jit
def seed_of(seed_ptr, key, high):
    """The two words of a seed as uint32: of the one in memory, if there is a pointer."""
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
        key = seed.to(tl.uint32)
        high = (seed >> 32).to(tl.uint32)
    else:
        key = key.to(tl.uint32)
        high = high.to(tl.uint32)
    return key, high


@triton.jit
def draw(x, group, other, key, high):
    """The two random words of each group, in the threads that hold `x`, one of its gradients."""
    # Zero, and LLVM knows it; Triton does not, and so draws the numbers in the threads that hold
    # the gradients. Otherwise it draws them elsewhere and moves them through shared memory.
    nothing = (x.to(tl.uint32, bitcast=True) & 1) >> 1
    return philox2x32((group ^ high) ^ nothing, other, key)


@triton.jit
def sample_scaled(x0, x1, x2, x3, group, other, key, high, scale, EXACT: tl.constexpr):
    """The same times `scale` (positive); then the largest magnitudes before and after, unscaled."""
    word0, word1 = draw(x0, group, other, key, high)
    a0, a1, a2, a3 = tl.abs(x0), tl.abs(x1), tl.abs(x2), tl.abs(x3)
    if EXACT:
        o0, o1, o2, o3, largest, kept = _exact(a0, a1, a2, a3, word0, scale)
    else:
        o0, o1, o2, o3 = _approximate(a0, a1, a2, a3, word0, word1)
        largest = larger(larger(a0, a1), larger(a2, a3))
        kept = larger(larger(o0, o1), larger(o2, o3))
        o0, o1, o2, o3 = o0 * scale, o1 * scale, o2 * scale, o3 * scale
    o0, o1, o2, o3 = _signed(o0, x0), _signed(o1, x1), _signed(o2, x2), _signed(o3, x3)
    return o0, o1, o2, o3, largest, kept


def seed_arguments(seed: SeedLike) -> tuple[torch.Tensor | None, int, int]:
    """A device seed as a pointer, or an int as two int32 (one type, so one compiled kernel)."""
    if isinstance(seed, torch.Tensor):
        return seed, 0, 0
    key, high = (int(word) for word in seed_words(seed))
    return None, key - ((key >> 31) << 32), high - ((high >> 31) << 32)
