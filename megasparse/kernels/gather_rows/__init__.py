"""Tokens as the rows of the experts' GEMMs, with zeros where no token is; in full or in 8 bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megasparse.errors import KernelError
from megasparse.kernels import dispatch
from megasparse.kernels.checks import WIDE_DTYPES, require
from megasparse.kernels.float8 import check_parts, check_scaling, raise_amax
from megasparse.kernels.gather_rows import reference, triton

DTYPES = (torch.bfloat16, torch.float16)
WIDTH_MULTIPLE = 64


@torch.no_grad()
def gather_rows(
    x: torch.Tensor, sources: torch.Tensor, *, backend: str | None = None
) -> torch.Tensor:
    """`x[sources]`, zeros where a source is negative: (T', ...) of x (T, ...).

    Args:
        x: float32, bfloat16 or float16 (others with the reference alone), copied unless it is
            contiguous.
        sources: int32 (T',), below T.
        backend: None, "reference" or "triton".

    Raises: KernelError for other sources, or a backend that cannot run.
    """
    require("gather_rows", "sources", sources, torch.int32, (sources.numel(),), x.device)
    if backend is None and x.dtype not in WIDE_DTYPES:
        backend = "reference"
    run = dispatch.implementation(
        "gather_rows", x, backend, reference=reference.gather_rows, triton=triton.gather_rows
    )
    with torch.cuda.device_of(x):  # Triton launches on the current device
        return run(x, sources)


@torch.no_grad()
def sum_rows(
    rows: torch.Tensor, spots: torch.Tensor, parts: torch.Tensor, *, backend: str | None = None
) -> torch.Tensor:
    """`rows[spots[parts]]`, summed over the parts of each token: (T, H) of rows (T', H).

    The reverse of `gather_rows` where a token is in several rows: its value if each was computed
    for a part of it, or its gradient. Sums are float32, rounded once.

    Args:
        rows: float32, bfloat16 or float16 (float64 with the reference alone), copied unless it is
            contiguous.
        spots: int64 (n,), the row of each part.
        parts: int32 (T, k), below n; negative: none.
        backend: None, "reference" or "triton".

    Raises: KernelError for other shapes or dtypes, or a backend that cannot run.
    """
    require("sum_rows", "spots", spots, torch.int64, (spots.numel(),), rows.device)
    if rows.dim() != 2 or parts.dim() != 2:
        raise KernelError(
            f"sum_rows: rows {tuple(rows.shape)} and parts {tuple(parts.shape)}, expected matrices"
        )
    require("sum_rows", "parts", parts, torch.int32, tuple(parts.shape), rows.device)
    if backend is None and rows.dtype not in WIDE_DTYPES:
        backend = "reference"
    run = dispatch.implementation(
        "sum_rows", rows, backend, reference=reference.sum_rows, triton=triton.sum_rows
    )
    with torch.cuda.device_of(rows):
        return run(rows, spots, parts)


@torch.no_grad()
def gather_float8(
    x: torch.Tensor,
    sources: torch.Tensor | None,
    counts: Sequence[int],
    *,
    scale: torch.Tensor,
    transposed: bool = True,
    amax: torch.Tensor | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`gather_rows`, times `scale`, in e4m3: row-major, and transposed for each expert.

    Args:
        x: (T, K), bfloat16 or float16, read row-major (copied otherwise); K a multiple of 64.
        sources: int32 (T',); None: x has the rows already.
        counts: rows of each expert, multiples of 128, at least one above 0; T' in all.
        scale: 0-d float32, the multiplier; to nearest even, saturated (infinities too); NaN stays.
        transposed: whether the transposed copy is wanted.
        amax: float32 (1,), raised to the largest magnitude before scaling; a NaN makes it NaN.
        backend: None, "reference" or "triton".

    Returns: (T', K) float8_e4m3fn; the (K, T_e) of each expert, one after the other in (K T',), or
    None (`blocks_of` gives them).

    Raises: KernelError on sizes, dtypes, or a backend that cannot run.
    """
    if x.dim() != 2 or x.dtype not in DTYPES or not x.shape[1] or x.shape[1] % WIDTH_MULTIPLE:
        raise KernelError(
            f"gather_float8: x is {x.dtype} of shape {tuple(x.shape)}, expected 16 bits, (T, K), "
            f"K a multiple of {WIDTH_MULTIPLE}"
        )
    rows = x.shape[0] if sources is None else sources.numel()
    check_parts("gather_float8", counts, rows)
    require("gather_float8", "sources", sources, torch.int32, (rows,), x.device)
    check_scaling("gather_float8", x.device, scale, amax)
    run = dispatch.implementation(
        "gather_float8", x, backend, reference=_by_definition, triton=triton.gather_float8
    )
    with torch.cuda.device_of(x):
        return run(x, sources, counts, scale, transposed, amax)


def _by_definition(
    x: torch.Tensor,
    sources: torch.Tensor | None,
    counts: Sequence[int],
    scale: torch.Tensor,
    transposed: bool,
    amax: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    rows, blocks, found = reference.gather_float8(x, sources, counts, scale, transposed)
    raise_amax(amax, found)
    return rows, blocks
