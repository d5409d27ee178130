"""The definition of `grad_pack24`: the operations that it fuses, one after the other."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from megasparse.kernels.float8 import quantise
from megasparse.kernels.mvue24 import mvue24
from megasparse.kernels.pack24.reference import pack
from megasparse.kernels.packed24 import Packed24
from megasparse.kernels.random import SeedLike


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
