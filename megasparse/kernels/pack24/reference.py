"""The definition of `pack24` in plain torch; where codes lie in memory is in packed24.py."""

from __future__ import annotations

import torch

from megasparse.kernels.float8 import quantise as to_float8
from megasparse.kernels.packed24 import Packed24, codes_to_metadata


def pack(w: torch.Tensor, packed: Packed24, quantise: bool, flag: torch.Tensor) -> None:
    """Fill the values and metadata of `packed`.

    Args:
        w: (N, K) of packed.dtype, or wider with `quantise`: times 1 / packed.scale, saturated and
            cast to e4m3.
        flag: one int32, set to 1 when w has a group with more than two non-zeros.
    """
    rows, columns = packed.shape
    groups = w.reshape(rows, columns // 4, 4)
    nonzero = groups.float() != 0
    n0, n1, n2, n3 = nonzero.unbind(-1)
    count = n0.int() + n1.int() + n2.int()
    # The first non-zero (2 if it is not 0 or 1) and the last column that completes two: with
    # fewer than two non-zeros, zeros fill up from the end of the group.
    i0 = torch.where(n0, 0, torch.where(n1, 1, 2))
    i1 = torch.where(n3 | (count < 2), 3, torch.where(n2, 2, 1))
    index = torch.stack([i0, i1], -1)
    if quantise:
        kept = to_float8(groups.gather(-1, index), packed.scale.reciprocal(), packed.dtype)
    else:  # by bits: torch does not gather e4m3
        bits = torch.int16 if packed.dtype.itemsize == 2 else torch.int8
        kept = groups.view(bits).gather(-1, index).view(packed.dtype)
    packed.values.copy_(kept.reshape(rows, columns // 2))
    packed.metadata.copy_(codes_to_metadata((i0 | i1 << 2).to(torch.uint8), packed.dtype))
    flag.bitwise_or_(((count + n3.int()) > 2).any().int())


def unpack(packed: Packed24) -> torch.Tensor:
    """The dense (N, K) matrix: of packed.dtype for 16 bits, float32 (values * scale) for 8."""
    return packed.dense()
