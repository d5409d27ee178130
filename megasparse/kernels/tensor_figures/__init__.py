"""Figures of whole tensors for metrics: each tensor is read once, and nothing waits for the device.

Sums are float64 and are added up in a fixed order, so that a run that is repeated reports the same
bits. Every function can be captured in a CUDA graph.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from megasparse.errors import KernelError
from megasparse.kernels import dispatch
from megasparse.kernels.checks import WIDE_DTYPES, require
from megasparse.kernels.float8 import MAXIMUM
from megasparse.kernels.tensor_figures import reference, triton

FACTOR_DTYPES = (torch.float32, torch.float64)


class TensorFigures(NamedTuple):
    """Figures of one tensor; each 0-d.

    Attributes:
        nonzeros: float64, entries that are not zero; NaN is not.
        magnitude: float64, the sum of magnitudes.
        square: float64, the sum of squares.
        largest: float32, the largest magnitude; NaN where there is one.
    """

    nonzeros: torch.Tensor
    magnitude: torch.Tensor
    square: torch.Tensor
    largest: torch.Tensor


@torch.no_grad()
def tensor_figures(x: torch.Tensor, *, backend: str | None = None) -> TensorFigures:
    """Non-zeros, sums of magnitudes and squares, and the largest magnitude of x, in one pass.

    Args:
        x: float32, bfloat16 or float16, any shape, not empty; copied unless it is contiguous.
        backend: None, "reference" or "triton".

    Raises: KernelError for another dtype, no entries, or a backend that cannot run.
    """
    op = "tensor_figures"
    _check(op, "x", x, WIDE_DTYPES)
    run = dispatch.implementation(
        op, x, backend, reference=reference.tensor_figures, triton=triton.tensor_figures
    )
    with torch.cuda.device_of(x):  # Triton launches on the current device
        return TensorFigures(*run(x.contiguous()))


@torch.no_grad()
def add_square_(
    total: torch.Tensor,
    x: torch.Tensor,
    *,
    factor: float | torch.Tensor = 1.0,
    backend: str | None = None,
) -> torch.Tensor:
    """total += the sum of squares of `x * factor`, in place; returns `total`.

    Args:
        total: float64 0-d.
        x: float32, bfloat16, float16, float8_e4m3fn or float8_e5m2, any shape; copied unless it is
            contiguous.
        factor: what undoes a scaling, for example; or 0-d float32 or float64 on x's device.
        backend: None, "reference" or "triton".

    Raises: KernelError for other dtypes, shapes or devices, or a backend that cannot run.
    """
    op = "add_square_"
    _check(op, "x", x, (*WIDE_DTYPES, *MAXIMUM), empty=True)
    require(op, "total", total, torch.float64, (), x.device)
    if isinstance(factor, torch.Tensor):
        dtype = factor.dtype if factor.dtype in FACTOR_DTYPES else torch.float32
        require(op, "factor", factor, dtype, (), x.device)
    run = dispatch.implementation(
        op, x, backend, reference=_square_by_definition, triton=triton.add_square_
    )
    if x.numel():
        with torch.cuda.device_of(x):
            run(total, x.contiguous(), factor)
    return total


@torch.no_grad()
def add_rounding_figures_(
    sums: torch.Tensor,
    largest: torch.Tensor,
    values: torch.Tensor,
    rounded: torch.Tensor,
    *,
    backend: str | None = None,
) -> None:
    """Add what a rounding to 8 bits did to `sums`, and raise `largest` to the largest |values|.

    sums[0] += entries of `rounded` that are at least the format's largest finite number (e5m2's
    infinity is, NaN is not); sums[1] += non-zeros of `values` less those of `rounded`; sums[2] +=
    entries of `values`.

    Args:
        sums: float64 (3,), contiguous.
        largest: float32 0-d; a NaN in `values` makes it NaN.
        values: float32, bfloat16 or float16, any shape, not empty; copied unless it is contiguous.
        rounded: float8_e4m3fn or float8_e5m2, scaled, any shape: it may have zeros that fill it up,
            and lack entries that are zero. Copied unless it is contiguous.
        backend: None, "reference" or "triton".

    Raises: KernelError for other dtypes, shapes or devices, or a backend that cannot run.
    """
    op = "add_rounding_figures_"
    _check(op, "values", values, WIDE_DTYPES)
    _check(op, "rounded", rounded, tuple(MAXIMUM))
    require(op, "sums", sums, torch.float64, (3,), values.device)
    require(op, "largest", largest, torch.float32, (), values.device)
    require(op, "rounded", rounded, rounded.dtype, tuple(rounded.shape), values.device)
    if not sums.is_contiguous():
        raise KernelError(f"{op}: sums has strides {sums.stride()}, expected a contiguous tensor")
    run = dispatch.implementation(
        op,
        values,
        backend,
        reference=_rounding_by_definition,
        triton=triton.add_rounding_figures_,
    )
    with torch.cuda.device_of(values):
        run(sums, largest, values.contiguous(), rounded.contiguous())


def _square_by_definition(
    total: torch.Tensor, x: torch.Tensor, factor: float | torch.Tensor
) -> None:
    times = factor.double() if isinstance(factor, torch.Tensor) else factor
    total.add_(reference.square(x) * times**2)


def _rounding_by_definition(
    sums: torch.Tensor, largest: torch.Tensor, values: torch.Tensor, rounded: torch.Tensor
) -> None:
    found, most = reference.rounding_figures(values, rounded)
    sums.add_(found)
    largest.copy_(torch.maximum(largest, most))


def _check(
    op: str, name: str, x: torch.Tensor, dtypes: tuple[torch.dtype, ...], empty: bool = False
) -> None:
    if x.dtype not in dtypes or not (empty or x.numel()):
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise KernelError(
            f"{op}: {name} is {x.dtype} of shape {tuple(x.shape)}, expected "
            f"{'' if empty else 'a non-empty tensor of '}{names}"
        )
