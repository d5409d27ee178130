"""Device functions of `activation_grad_pack24`: the gradients of two groups of tokens, rounded."""

from __future__ import annotations

import triton
import triton.language as tl

from megasparse.kernels.activation.triton import gated, grad_gate
from megasparse.kernels.device.groups import first_token, pair16, widen
from megasparse.kernels.mvue24.triton_tile import load_token, step_of


@triton.jit
def _gradients(
    dy_ptrs,
    fused_ptrs,
    width,
    token,
    num_tokens,
    factors,
    GATED: tl.constexpr,
    GELU: tl.constexpr,
    FULL: tl.constexpr,
):
    """The gradients of the gate and of x, if there is one, in float32; `fused_ptrs` point to
    gates."""
    dy = widen(load_token(dy_ptrs, token, num_tokens, FULL)) * factors[0]
    gate = widen(load_token(fused_ptrs, token, num_tokens, FULL)) * factors[1]
    if GATED:
        x = widen(load_token(fused_ptrs + width, token, num_tokens, FULL)) * factors[1]
        return grad_gate(dy, x, gate, GELU), gated(dy, gate, GELU)
    else:
        of_gate = grad_gate(dy, 1.0, gate, GELU)
        return of_gate, of_gate


@triton.jit
def _two_tokens(
    dy_ptrs,
    fused_ptrs,
    strides,
    width,
    token,
    step,
    num_tokens,
    factors,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    GELU: tl.constexpr,
    FULL: tl.constexpr,
):
    """Two tokens' gradients of the gate, rounded, in one uint32, and of x in another.

    The strides of dy and `fused` are from the one to the other, and so are their factors.
    """
    gate0, x0 = _gradients(
        dy_ptrs, fused_ptrs, width, token, num_tokens, factors, GATED, GELU, FULL
    )
    dy_ptrs, fused_ptrs, token = dy_ptrs + strides[0], fused_ptrs + strides[1], token + step
    gate1, x1 = _gradients(
        dy_ptrs, fused_ptrs, width, token, num_tokens, factors, GATED, GELU, FULL
    )
    return pair16(gate0, gate1, KIND), pair16(x0, x1, KIND)


@triton.jit
def two_groups(
    dy_ptr,
    fused_ptr,
    group,
    column,
    width,
    num_tokens,
    padded_tokens,
    dy_stride,
    fused_stride,
    factors,
    GATED: tl.constexpr,
    GELU: tl.constexpr,
    STRIDED: tl.constexpr,
    FULL: tl.constexpr,
):
    """Of `group` and of the next one: gradients of the gate, as two uint32, and of x, as two."""
    KIND: tl.constexpr = "bf16" if dy_ptr.dtype.element_ty == tl.bfloat16 else "fp16"
    step = step_of(padded_tokens, STRIDED)
    token = first_token(group, STRIDED)
    dy, fused = dy_ptr + token * dy_stride + column, fused_ptr + token * fused_stride + column
    dy_step, fused_step = dy_stride * step, fused_stride * step
    steps = (dy_step, fused_step)
    a01, x01 = _two_tokens(
        dy, fused, steps, width, token, step, num_tokens, factors, KIND, GATED, GELU, FULL
    )
    dy, fused, token = dy + 2 * dy_step, fused + 2 * fused_step, token + 2 * step
    a23, x23 = _two_tokens(
        dy, fused, steps, width, token, step, num_tokens, factors, KIND, GATED, GELU, FULL
    )
    token = first_token(group + 1, STRIDED)
    dy, fused = dy_ptr + token * dy_stride + column, fused_ptr + token * fused_stride + column
    b01, y01 = _two_tokens(
        dy, fused, steps, width, token, step, num_tokens, factors, KIND, GATED, GELU, FULL
    )
    dy, fused, token = dy + 2 * dy_step, fused + 2 * fused_step, token + 2 * step
    b23, y23 = _two_tokens(
        dy, fused, steps, width, token, step, num_tokens, factors, KIND, GATED, GELU, FULL
    )
    return a01, a23, x01, x23, b01, b23, y01, y23
