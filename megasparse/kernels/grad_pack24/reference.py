"""The definition of `grad_pack24`: the operations that it fuses, one after the other."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from megasparse.kernels.float8 import quantize, whole_tiles
from megasparse.kernels.mvue24.places import Places
from megasparse.kernels.mvue_pack24.reference import mvue24_of_sections
from megasparse.kernels.pack24.reference import pack24
from megasparse.kernels.packed24 import E4M3, Packed24
from megasparse.kernels.random import SeedLike
from megasparse.kernels.token_order import by_groups

# Rows, packed, the largest |dz| and |MVUE(dz)|, and whether a packed group is crowded (all 0-d).
Result = tuple[torch.Tensor | None, Packed24, torch.Tensor, torch.Tensor, torch.Tensor]


def grad_pack24(
    dz: torch.Tensor,
    seed: SeedLike,
    channels: tuple[tuple[int, int, int], ...],
    tokens: Places,
    exact: bool,
    strided: bool,
    row_scale: torch.Tensor | None,
    row_dtype: torch.dtype | None,
    packed_scale: torch.Tensor,
) -> Result:
    """dZ quantized (None without `row_dtype`), MVUE(dZ)^T packed in e4m3, and what was found."""
    row = None
    if row_dtype is not None and row_scale is not None:
        row = quantize(dz, row_scale, row_dtype)
    missing = whole_tiles(dz.shape[0]) - dz.shape[0]
    padded = pad(dz.float(), (0, 0, 0, missing))
    pruned = mvue24_of_sections(padded, seed, channels, tokens, exact, strided)
    if strided:
        pruned = by_groups(pruned)
    quantized = quantize(pruned.t(), packed_scale, E4M3)
    packed, crowded = pack24(quantized, E4M3, packed_scale.reciprocal())
    return row, packed, dz.float().abs().amax(), pruned.abs().amax(), crowded
