"""The definition of `swiglu_grad_pack24`: the operations that it fuses, one after the other."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from megasparse.kernels.float8 import whole_tiles
from megasparse.kernels.grad_pack24.reference import Result, grad_pack24
from megasparse.kernels.mvue24.places import Places
from megasparse.kernels.random import SeedLike
from megasparse.kernels.swiglu.reference import backward_fused


def swiglu_grad_pack24(
    dy: torch.Tensor,
    fused: torch.Tensor,
    seed: SeedLike,
    places: tuple[int, int],
    tokens: Places,
    exact: bool,
    strided: bool,
    row_scale: torch.Tensor | None,
    row_dtype: torch.dtype | None,
    packed_scale: torch.Tensor,
) -> Result:
    """`grad_pack24` of the gradient of swiglu(`fused`), whose halves lie at `places` in the layer.

    The gradient has tokens of zeros up to a multiple of 128.
    """
    count, width = dy.shape
    dz = pad(backward_fused(dy, fused, False), (0, 0, 0, whole_tiles(count) - count))
    channels = ((0, places[0], width), (width, places[1], width))
    return grad_pack24(
        dz, seed, channels, tokens, exact, strided, row_scale, row_dtype, packed_scale
    )
