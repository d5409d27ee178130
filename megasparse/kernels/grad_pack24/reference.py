"""The definitions: the operations that are fused, one after the other."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from megasparse.kernels.float8 import quantise
from megasparse.kernels.mvue24 import mvue24
from megasparse.kernels.pack24.reference import pack
from megasparse.kernels.packed24 import Packed24
from megasparse.kernels.random import SeedLike
from megasparse.kernels.swiglu.reference import backward


def grad_pack24(
    dz: torch.Tensor,
    seed: SeedLike,
    channels: tuple[tuple[int, int, int], ...],
    exact: bool,
    scales: tuple[torch.Tensor | None, torch.Tensor],
    row: torch.Tensor | None,
    packed: Packed24,
    maxima: tuple[torch.Tensor | None, torch.Tensor | None],
    flag: torch.Tensor,
) -> None:
    """Fill `row` and `packed` (with its scale), raise `maxima`; each for (dz, MVUE(dz))."""
    row_scale, packed_scale = scales
    if row is not None:
        assert row_scale is not None
        row.copy_(quantise(dz, row_scale, row.dtype))
    pruned = torch.cat(
        [
            mvue24(
                dz.narrow(1, start, length).float(), seed=seed, dim=0, offsets=(0, place),
                exact=exact, backend="reference",
            )
            for start, place, length in channels
        ],
        1,
    )  # fmt: skip
    for amax, x in zip(maxima, (dz, pruned)):
        if amax is not None:
            amax.copy_(torch.maximum(amax, x.float().abs().amax()))
    missing = packed.shape[1] - dz.shape[0]
    quantised = quantise(pad(pruned.t(), (0, missing)), packed_scale, packed.dtype)
    pack(quantised.contiguous(), packed, False, flag)
    packed.scale.copy_(packed_scale.reciprocal())


def swiglu_grad_pack24(
    dy: torch.Tensor,
    fused: torch.Tensor,
    seed: SeedLike,
    places: tuple[int, int],
    exact: bool,
    scales: tuple[torch.Tensor | None, torch.Tensor],
    row: torch.Tensor | None,
    packed: Packed24,
    maxima: tuple[torch.Tensor | None, torch.Tensor | None],
    flag: torch.Tensor,
) -> None:
    """The same of the gradient of swiglu(`fused`), whose halves lie at `places` in the layer."""
    width = dy.shape[1]
    gate, x = fused.chunk(2, dim=1)
    dx, dgate = backward(dy, x, gate, False)
    dz = pad(torch.cat([dgate, dx], 1), (0, 0, 0, packed.shape[1] - dy.shape[0]))
    channels = ((0, places[0], width), (width, places[1], width))
    grad_pack24(dz, seed, channels, exact, scales, row, packed, maxima, flag)
