"""Triton kernels of the activations: one pass forward, one pass backward, along memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from megasparse.errors import KernelError
from megasparse.kernels.activation.kinds import Activation, is_gated
from megasparse.kernels.activation.layout import Plane, common_plane
from megasparse.kernels.activation.reference import GELU_H1, GELU_H3
from megasparse.kernels.device.float8 import product_factor
from megasparse.kernels.dispatch import INTERPRETING
from megasparse.kernels.factors import NOTHING, Lacking

_H1 = tl.constexpr(GELU_H1)
_H3 = tl.constexpr(GELU_H3)
_INTERPRETING = tl.constexpr(INTERPRETING)


@dataclass(frozen=True)
class Launch:
    """Elements a program handles (in runs of at most as many) and its warps."""

    elements: int
    num_warps: int


# 16 elements a thread: two loads of 16 bytes for each 16-bit input.
FORWARD = Launch(elements=2048, num_warps=4)
BACKWARD = Launch(elements=2048, num_warps=4)
# The interpreter costs time per program, not per element.
INTERPRETED = Launch(elements=1 << 16, num_warps=4)


@triton.jit
def _tile(num_rows, num_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Row and column indices (int64) of this program's tile, and which of them exist."""
    tiles = tl.cdiv(num_columns, COLUMNS)
    pid = tl.program_id(0)
    row = (pid // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (pid % tiles).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return row, column, (row < num_rows) & (column < num_columns)


@triton.jit
def _sigmoid(h):
    """1 / (1 + exp(-h)) within 2 ulp; 0 where it is no normal number, below -87.

    By the GPU's instructions that take subnormal numbers for zero: those that do not need four
    others each, and down to there they give the same.
    """
    if _INTERPRETING:
        return tl.sigmoid(h)
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .f32 e; mul.f32 e, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 e, e; "
            "add.f32 e, e, 0f3F800000; rcp.approx.ftz.f32 $0, e; }",  # -log2(e), 1
            "=f,f",
            [h],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )


@triton.jit
def _gate_parts(g, GELU: tl.constexpr):
    """sigmoid(h(g)) and h'(g); see reference.py."""
    if GELU:  # fused as in `grad_gate`
        square = g * g
        return _sigmoid(g * tl.fma(square, _H3, _H1)), tl.fma(square, 3.0 * _H3, _H1)
    else:
        return _sigmoid(g), 1.0


@triton.jit
def gated(x, gate, GELU: tl.constexpr):
    """act(gate) * x in float32."""
    s, _ = _gate_parts(gate, GELU)
    return x * (gate * s)


@triton.jit
def grad_gate(dy, x, gate, GELU: tl.constexpr):
    """The gradient of `gated` with respect to the gate."""
    s, slope = _gate_parts(gate, GELU)
    # Fused as the compiler does anyway, so that a kernel in which it may not gives the same.
    if GELU:
        return dy * x * tl.fma(gate * s * (1.0 - s), slope, s)
    else:
        return dy * x * tl.fma(gate * s, 1.0 - s, s)


@triton.jit
def _gated_forward_kernel(
    x_ptr,
    gate_ptr,
    out_ptr,
    num_rows,
    num_columns,
    x_stride,
    gate_stride,
    out_stride,
    GELU: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row, column, mask = _tile(num_rows, num_columns, ROWS, COLUMNS)
    x = tl.load(x_ptr + row * x_stride + column, mask=mask).to(tl.float32)
    g = tl.load(gate_ptr + row * gate_stride + column, mask=mask).to(tl.float32)
    out = gated(x, g, GELU).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * out_stride + column, out, mask=mask)


@triton.jit
def _gated_backward_kernel(
    dy_ptr,
    x_ptr,
    gate_ptr,
    dx_ptr,
    dgate_ptr,
    dy_a_ptr,
    dy_b_ptr,
    dy_applied_inv,
    a_ptr,
    b_ptr,
    applied_inv,
    num_rows,
    num_columns,
    dy_stride,
    x_stride,
    gate_stride,
    dx_stride,
    dgate_stride,
    GELU: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row, column, mask = _tile(num_rows, num_columns, ROWS, COLUMNS)
    dy_factor = product_factor(dy_a_ptr, dy_b_ptr, dy_applied_inv)
    factor = product_factor(a_ptr, b_ptr, applied_inv)
    dy = tl.load(dy_ptr + row * dy_stride + column, mask=mask).to(tl.float32) * dy_factor
    x = tl.load(x_ptr + row * x_stride + column, mask=mask).to(tl.float32) * factor
    g = tl.load(gate_ptr + row * gate_stride + column, mask=mask).to(tl.float32) * factor
    dx = gated(dy, g, GELU).to(dx_ptr.dtype.element_ty)
    tl.store(dx_ptr + row * dx_stride + column, dx, mask=mask)
    dgate = grad_gate(dy, x, g, GELU).to(dgate_ptr.dtype.element_ty)
    tl.store(dgate_ptr + row * dgate_stride + column, dgate, mask=mask)


@triton.jit
def _gelu_forward_kernel(x_ptr, out_ptr, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < size).to(tl.float32)
    tl.store(out_ptr + at, gated(1.0, x, True).to(out_ptr.dtype.element_ty), mask=at < size)


@triton.jit
def _gelu_backward_kernel(
    dy_ptr,
    x_ptr,
    dx_ptr,
    dy_a_ptr,
    dy_b_ptr,
    dy_applied_inv,
    a_ptr,
    b_ptr,
    applied_inv,
    size,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    dy_factor = product_factor(dy_a_ptr, dy_b_ptr, dy_applied_inv)
    dy = tl.load(dy_ptr + at, mask=at < size).to(tl.float32) * dy_factor
    factor = product_factor(a_ptr, b_ptr, applied_inv)
    x = tl.load(x_ptr + at, mask=at < size).to(tl.float32) * factor
    dx = grad_gate(dy, 1.0, x, True)
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=at < size)


def forward(x: torch.Tensor, gate: torch.Tensor, gelu: bool) -> torch.Tensor:
    """act(gate) * x, in the layout of `x`; see reference.py."""
    _check(x)
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    plane, (x, gate) = _in_layout_of(out, x, gate)
    _launch(_gated_forward_kernel, FORWARD, plane, (x, gate, out), gelu)
    return out


def backward(
    dy: torch.Tensor, x: torch.Tensor, gate: torch.Tensor, gelu: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients with respect to `x` and `gate`; see reference.py."""
    dx, dgate = torch.empty_like(x), torch.empty_like(gate)
    _write_gradients(dy, x, gate, gelu, dx, dgate)
    return dx, dgate


def forward_fused(fused: torch.Tensor, activation: Activation) -> torch.Tensor:
    """The activation of `fused`; see reference.py."""
    if is_gated(activation):
        gate, x = fused.chunk(2, dim=-1)
        return forward(x, gate, activation == "geglu")
    _check(fused)
    out = torch.empty_like(fused)
    _launch_flat(_gelu_forward_kernel, FORWARD, fused, out)
    return out


def backward_fused(
    dy: torch.Tensor,
    fused: torch.Tensor,
    activation: Activation,
    dy_factors: Lacking = NOTHING,
    factors: Lacking = NOTHING,
) -> torch.Tensor:
    """The gradient with respect to `fused`; see reference.py."""
    gradient = torch.empty_like(fused)
    if is_gated(activation):
        gate, x = fused.chunk(2, dim=-1)
        dgate, dx = gradient.chunk(2, dim=-1)
        _write_gradients(dy, x, gate, activation == "geglu", dx, dgate, (*dy_factors, *factors))
    else:
        _check(fused)
        lacks = (*dy_factors, *factors)
        _launch_flat(_gelu_backward_kernel, BACKWARD, dy, fused, gradient, lacks=lacks)
    return gradient


def _write_gradients(
    dy: torch.Tensor,
    x: torch.Tensor,
    gate: torch.Tensor,
    gelu: bool,
    dx: torch.Tensor,
    dgate: torch.Tensor,
    lacks: tuple[Any, ...] = (*NOTHING, *NOTHING),
) -> None:
    """Fill `dx` and `dgate`, in the layouts that they have."""
    if x.numel() == 0:
        return
    same_order = common_plane(dx, dgate) is not None
    written = dgate if same_order else torch.empty_like(dx)
    plane, (dy, x, gate) = _in_layout_of(dx, dy, x, gate)
    plane = plane._replace(strides=(*plane.strides, plane.strides[-1]))
    _launch(_gated_backward_kernel, BACKWARD, plane, (dy, x, gate, dx, written), gelu, lacks)
    if not same_order:
        dgate.copy_(written)


def _check(x: torch.Tensor) -> None:
    if x.dtype == torch.float64:
        raise KernelError("gated activation: x is float64, expected 32 or 16 bits for triton")


def _in_layout_of(
    out: torch.Tensor, *inputs: torch.Tensor
) -> tuple[Plane, tuple[torch.Tensor, ...]]:
    """One plane over inputs and `out`; inputs that lie otherwise in memory are copied.

    `out` is dense, or half of a dense tensor along its last dimension.
    """
    plane = common_plane(*inputs, out)
    if plane is None:
        inputs = tuple(
            t if common_plane(t, out) is not None else torch.empty_like(out).copy_(t)
            for t in inputs
        )
        plane = common_plane(*inputs, out)
    if plane is None:
        inputs = tuple(torch.empty_like(out).copy_(t) for t in inputs)
        plane = common_plane(*inputs, out)
    assert plane is not None  # dense tensors in one order are one run; halves of one, a plane
    return plane, inputs


def _launch_flat(
    kernel: triton.JITFunction,
    launch: Launch,
    *tensors: torch.Tensor,
    lacks: tuple[Any, ...] = (),
) -> None:
    """Over the memory of tensors of one shape; the last is written."""
    out = tensors[-1]
    inputs = [t if t.stride() == out.stride() else torch.empty_like(out).copy_(t) for t in tensors]
    launch = INTERPRETED if INTERPRETING else launch
    grid = (triton.cdiv(out.numel(), launch.elements),)
    if out.numel():
        size = out.numel()
        kernel[grid](*inputs, *lacks, size, BLOCK=launch.elements, num_warps=launch.num_warps)


def _launch(
    kernel: triton.JITFunction,
    launch: Launch,
    plane: Plane,
    tensors: tuple[torch.Tensor, ...],
    gelu: bool,
    lacks: tuple[Any, ...] = (),
) -> None:
    launch = INTERPRETED if INTERPRETING else launch
    columns = min(launch.elements, triton.next_power_of_2(plane.columns))
    rows = launch.elements // columns
    grid = (triton.cdiv(plane.rows, rows) * triton.cdiv(plane.columns, columns),)
    kernel[grid](
        *tensors,
        *lacks,
        plane.rows,
        plane.columns,
        *plane.strides,
        GELU=gelu,
        ROWS=rows,
        COLUMNS=columns,
        num_warps=launch.num_warps,
    )
