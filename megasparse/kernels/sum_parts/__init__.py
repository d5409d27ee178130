"""A sum over ranks of tensors that all of them can read."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megasparse.errors import KernelError
from megasparse.kernels import dispatch
from megasparse.kernels.checks import WIDE_DTYPES
from megasparse.kernels.sum_parts import reference, triton

MOST_PARTS = triton.MOST


@torch.no_grad()
def sum_parts(
    parts: Sequence[torch.Tensor],
    *,
    out: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """The sum of one to eight tensors, added in float32 in their order and rounded once.

    Args:
        parts: float32, bfloat16 or float16, of one shape, contiguous; the GPU can read them all,
            also those in the memory of another.
        out: of that shape and dtype, contiguous: gets the sum; may be one of the parts.
        backend: None, "reference" or "triton".

    Returns: `out`, or a new tensor.

    Raises: KernelError for other numbers, dtypes, shapes, devices or layouts, or a backend that
        cannot run.
    """
    if not 1 <= len(parts) <= MOST_PARTS:
        raise KernelError(f"sum_parts: {len(parts)} parts, expected 1 to {MOST_PARTS}")
    first = parts[0]
    if first.dtype not in WIDE_DTYPES:
        raise KernelError(
            f"sum_parts: parts are {first.dtype}, expected float32, bfloat16 or float16"
        )
    for part in (*parts, first if out is None else out):
        same = (part.dtype, part.shape, part.device) == (first.dtype, first.shape, first.device)
        if not same or not part.is_contiguous():
            raise KernelError(
                f"sum_parts: a part is {part.dtype} {tuple(part.shape)} on {part.device}, strides "
                f"{part.stride()}, expected {first.dtype} {tuple(first.shape)} on {first.device}, "
                "contiguous"
            )
    run = dispatch.implementation(
        "sum_parts", first, backend, reference=_by_definition, triton=triton.sum_parts
    )
    if out is None:
        out = torch.empty_like(first)
    with torch.cuda.device_of(first):
        run(parts, out)
    return out


def _by_definition(parts: Sequence[torch.Tensor], out: torch.Tensor) -> None:
    out.copy_(reference.sum_parts(parts))
