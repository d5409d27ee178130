"""Which shards of a linear's weight the FP8 GEMMs take."""

from __future__ import annotations

from collections.abc import Sequence

from megasparse.kernels.packed24 import COLUMN_MULTIPLE, E4M3, ROW_MULTIPLE

TILE = COLUMN_MULTIPLE[E4M3]  # rows and columns of a packed 8-bit operand, and tokens
DENSE_MULTIPLE = 16  # of rows and columns, cuBLAS's for 8 bits


def refusal(name: str, shape: Sequence[int], tp: int, parts: int, sparse: bool) -> str | None:
    """Why the GEMMs of a linear cannot be in FP8, or None.

    Args:
        name: of the linear.
        shape: `(N, K)` of its weight on one rank.
        tp: tensor-parallel ranks.
        parts: matrices that are fused along N.
        sparse: whether it is 2:4.
    """
    multiple, of_parts = (TILE, ROW_MULTIPLE) if sparse else (DENSE_MULTIPLE, 1)
    rows, columns = shape
    if not (rows % multiple or columns % multiple or rows // parts % of_parts):
        return None
    kind = "2:4 linear" if sparse else "dense linear"
    fused = f", {parts} fused parts of {rows // parts} rows" if parts > 1 else ""
    expected = f"multiples of {multiple}" + (f", and parts of {of_parts}" if sparse else "")
    return (
        f"{name}: FP8 of a {kind} with a shard of {rows} x {columns} (tensor_model_parallel_size "
        f"{tp}{fused}), expected {expected}"
    )
