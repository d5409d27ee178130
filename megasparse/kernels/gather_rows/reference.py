"""The definitions of `gather_rows` and `gather_float8`, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megasparse.kernels.float8 import quantize, transposed_blocks
from megasparse.kernels.packed24 import E4M3


def gather_rows(x: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
    """(T', ...) of x (T, ...)."""
    held = torch.nonzero(sources >= 0).flatten()
    rows = x.new_zeros(sources.numel(), *x.shape[1:])
    return rows.index_copy_(0, held, x.detach()[sources[held]])


def sum_rows(rows: torch.Tensor, spots: torch.Tensor, parts: torch.Tensor) -> torch.Tensor:
    """(T, H), added up part by part."""
    wide = rows.detach().to(torch.promote_types(rows.dtype, torch.float32))
    total = wide.new_zeros(parts.shape[0], rows.shape[1])
    for part in parts.t():
        held = torch.nonzero(part >= 0).flatten()
        total.index_add_(0, held, wide[spots[part[held].long()]])
    return total.to(rows.dtype)


def gather_float8(
    x: torch.Tensor,
    sources: torch.Tensor | None,
    counts: Sequence[int],
    scale: torch.Tensor,
    transposed: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Rows, transposed blocks or None, and the largest magnitude, 0-d."""
    wide = x.detach() if sources is None else gather_rows(x, sources)
    rows = quantize(wide, scale, E4M3)
    blocks = transposed_blocks(rows, counts) if transposed else None
    return rows, blocks, wide.float().abs().amax()
