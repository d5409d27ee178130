"""A sum in float32 of tensors in 16 bits, such as the gradients of micro-batches."""

from __future__ import annotations

import torch

from megasparse.errors import KernelError
from megasparse.kernels import dispatch
from megasparse.kernels.accumulate import reference, triton
from megasparse.kernels.checks import WIDE_DTYPES, require
from megasparse.kernels.factors import Factors, Lacking, lacking


@torch.no_grad()
def accumulate_(
    total: torch.Tensor,
    value: torch.Tensor,
    *,
    factors: Factors | None = None,
    begins: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """`total += value` in place, rounded once; returns `total`.

    One pass at the memory's bandwidth, which torch's addition of two dtypes does not reach.

    Args:
        total: float32, bfloat16 or float16, contiguous, any shape.
        value: of that shape, float32, bfloat16 or float16.
        factors: `(a, b, applied)`: the value is multiplied by `a * b / applied` before it is added,
            in float32; applied is a power of two. None: by 1.
        begins: int64 with one entry, not 0 where a new sum begins: total is written, not read.
            None: it does not.
        backend: None, "reference" or "triton".

    Raises: KernelError for other dtypes, shapes, devices or layouts, or a backend that cannot run.
    """
    for name, tensor in (("total", total), ("value", value)):
        if tensor.dtype not in WIDE_DTYPES:
            raise KernelError(
                f"accumulate_: {name} is {tensor.dtype}, expected float32, bfloat16 or float16"
            )
    if value.shape != total.shape or value.device != total.device or not total.is_contiguous():
        raise KernelError(
            f"accumulate_: value of shape {tuple(value.shape)} on {value.device}, expected "
            f"{tuple(total.shape)} on {total.device}, and a contiguous total"
        )
    lacks = lacking("accumulate_", factors, total.device)
    if begins is not None:
        require("accumulate_", "begins", begins, torch.int64, (1,), total.device)
    add = dispatch.implementation(
        "accumulate_", total, backend, reference=_by_definition, triton=triton.accumulate_
    )
    with torch.cuda.device_of(total):
        add(total, value, lacks, begins)
    return total


def _by_definition(
    total: torch.Tensor,
    value: torch.Tensor,
    factors: Lacking,
    begins: torch.Tensor | None,
) -> None:
    a, b, applied_inv = factors
    factor = None if a is None or b is None else a * applied_inv * b
    total.copy_(reference.accumulated(total, value, factor, begins))
