"""The definition of `pack24` and `unpack24` in plain torch.

A byte of metadata holds the codes of two groups. With row r and group g = column // 4 the bits of
both are dealt to byte address and nibble thus (a = r // 16 % 4, h = r // 8 % 2, b = r % 8):

16-bit: g = (G, gh: 2, gl: 4);          byte = (r // 64, G, a, b, gl, gh),      nibble = h
8-bit:  g = (G, g8: 2, gq: 4, gn: 2);   byte = (r // 64, G, a, b, gq, g8, h),   nibble = gn
"""

from __future__ import annotations

import torch

from megasparse.kernels.pack24.packed import Packed24


def pack(
    w: torch.Tensor, packed: Packed24, quantise: torch.Tensor | None, flag: torch.Tensor
) -> None:
    """Fill the values and metadata of `packed`.

    Args:
        w: (N, K) of packed.dtype, or wider with `quantise`, the 0-d float32 that it is multiplied
            by before the cast.
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
    if quantise is not None:
        kept = (groups.gather(-1, index).float() * quantise).to(packed.dtype)
    else:  # by bits: torch does not gather e4m3
        bits = torch.int16 if packed.dtype.itemsize == 2 else torch.int8
        kept = groups.view(bits).gather(-1, index).view(packed.dtype)
    packed.values.copy_(kept.reshape(rows, columns // 2))
    packed.metadata.copy_(_to_metadata((i0 | i1 << 2).to(torch.uint8), packed))
    flag.bitwise_or_(((count + n3.int()) > 2).any().int())


def unpack(packed: Packed24) -> torch.Tensor:
    """The dense (N, K) matrix: of packed.dtype for 16 bits, float32 (values * scale) for 8."""
    rows, columns = packed.shape
    codes = _from_metadata(packed).long()
    index = torch.stack([codes & 3, codes >> 2], -1)
    bits = packed.values.view(torch.int16 if packed.dtype.itemsize == 2 else torch.int8)
    dense = bits.new_zeros(rows, columns // 4, 4)
    dense.scatter_(-1, index, bits.reshape(rows, columns // 4, 2))
    w = dense.view(rows, columns).view(packed.dtype)
    return w if packed.dtype.itemsize == 2 else w.float() * packed.scale


def _to_metadata(codes: torch.Tensor, packed: Packed24) -> torch.Tensor:
    rows, columns = packed.shape
    if packed.dtype.itemsize == 2:
        c = codes.view(rows // 64, 4, 2, 8, columns // 32, 2, 4)
        return (c[:, :, 0] | c[:, :, 1] << 4).permute(0, 3, 1, 2, 5, 4).reshape(-1)
    c = codes.view(rows // 64, 4, 2, 8, columns // 64, 2, 4, 2)
    return (c[..., 0] | c[..., 1] << 4).permute(0, 4, 1, 3, 6, 5, 2).reshape(-1)


def _from_metadata(packed: Packed24) -> torch.Tensor:
    """The codes (N, K / 4), uint8."""
    rows, columns = packed.shape
    if packed.dtype.itemsize == 2:
        c = packed.metadata.view(rows // 64, columns // 32, 4, 8, 4, 2).permute(0, 2, 3, 1, 5, 4)
        return torch.stack([c & 15, c >> 4], 2).reshape(rows, columns // 4)
    c = packed.metadata.view(rows // 64, columns // 64, 4, 8, 4, 2, 2).permute(0, 2, 6, 3, 1, 5, 4)
    return torch.stack([c & 15, c >> 4], -1).reshape(rows, columns // 4)
