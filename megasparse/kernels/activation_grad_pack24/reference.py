"""The definition of `activation_grad_pack24`: the operations that it fuses, one after the other."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from megasparse.kernels.activation.kinds import Activation
from megasparse.kernels.activation.reference import backward_fused
from megasparse.kernels.float8 import whole_tiles
from megasparse.kernels.grad_pack24.reference import Result, grad_pack24
from megasparse.kernels.mvue24.places import Places
from megasparse.kernels.random import SeedLike


def activation_grad_pack24(
    dy: torch.Tensor,
    fused: torch.Tensor,
    activation: Activation,
    seed: SeedLike,
    places: tuple[int, ...],
    tokens: Places,
    exact: bool,
    strided: bool,
    row_scale: torch.Tensor | None,
    row_dtype: torch.dtype | None,
    packed_scale: torch.Tensor,
) -> Result:
    """`grad_pack24` of the gradient of `activated`, whose parts lie at `places` in the layer.

    The gradient has tokens of zeros up to a multiple of 128.
    """
    count, width = dy.shape
    dz = pad(backward_fused(dy, fused, activation), (0, 0, 0, whole_tiles(count) - count))
    channels = tuple((part * width, place, width) for part, place in enumerate(places))
    return grad_pack24(
        dz, seed, channels, tokens, exact, strided, row_scale, row_dtype, packed_scale
    )
