"""How an elementwise kernel walks tensors along memory instead of along their first dimension.

A 2:4 GEMM writes its result column-major, and the two halves of a fused projection are no dense
tensors; both are a plane of `rows` runs of `columns` contiguous elements, at a stride that may
differ from tensor to tensor.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Plane(NamedTuple):
    """`rows` runs of `columns` contiguous elements; the runs of tensor i are strides[i] apart."""

    rows: int
    columns: int
    strides: tuple[int, ...]


def common_plane(*tensors: torch.Tensor) -> Plane | None:
    """The plane that covers tensors of one shape in the same order, or None if there is none."""
    first = tensors[0]
    dims = [d for d in range(first.dim()) if first.shape[d] > 1]
    dims.sort(key=first.stride, reverse=True)
    columns = 1
    while dims and all(t.stride(dims[-1]) == columns for t in tensors):
        columns *= first.shape[dims.pop()]
    if not dims:
        return Plane(1, columns, (columns,) * len(tensors))
    if columns == 1:
        return None
    strides = tuple(t.stride(dims[-1]) for t in tensors)
    rows = 1
    while dims:
        dim = dims.pop()
        if any(t.stride(dim) != stride * rows for t, stride in zip(tensors, strides)):
            return None
        rows *= first.shape[dim]
    return Plane(rows, columns, strides)
