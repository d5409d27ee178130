"""Device functions: the random numbers of random.py."""

from __future__ import annotations

import triton
import triton.language as tl

from megasparse.kernels.dispatch import INTERPRETING
from megasparse.kernels.random import PHILOX_MULTIPLIER, PHILOX_ROUNDS, PHILOX_WEYL

_ROUNDS = tl.constexpr(PHILOX_ROUNDS)
_MULTIPLIER = tl.constexpr(PHILOX_MULTIPLIER)
_WEYL = tl.constexpr(PHILOX_WEYL)
_INTERPRETING = tl.constexpr(INTERPRETING)
_WIDE_PRODUCT = tl.constexpr(
    f"{{ .reg .b64 p; mul.wide.u32 p, $2, {PHILOX_MULTIPLIER}; mov.b64 {{$1, $0}}, p; }}"
)


@triton.jit
def _product(x):
    """High and low half of x * _MULTIPLIER: one instruction where the compiler makes two."""
    if _INTERPRETING:
        product = x.to(tl.uint64) * _MULTIPLIER
        return (product >> 32).to(tl.uint32), product.to(tl.uint32)
    else:
        return tl.inline_asm_elementwise(
            _WIDE_PRODUCT,
            "=r,=r,r",
            [x],
            dtype=(tl.uint32, tl.uint32),
            is_pure=True,
            pack=1,
        )


@triton.jit
def philox2x32(x0, x1, key):
    """Philox2x32 on uint32 counters (any shapes that broadcast) and a uint32 key."""
    for _ in tl.static_range(_ROUNDS):
        high, low = _product(x0)
        x0 = high ^ key ^ x1
        x1 = low
        key = key + _WEYL
    return x0, x1


@triton.jit
def uniform24(word):
    """float32 in [0, 1): the top 24 bits of a 32-bit word."""
    return (word >> 8).to(tl.int32).to(tl.float32) * (2.0**-24)
