"""The compressed 2:4 matrix as Hopper's sparse tensor cores and cuSPARSELt 0.8 read it.

Values are row-major (N, K / 2). A byte of metadata holds the codes of two groups: with row r and
group g = column // 4 the bits of both are dealt to the byte's address and its nibble thus, where
a = r // 16 % 4, h = r // 8 % 2 and b = r % 8:

16-bit: g = (G, gh: 2, gl: 4);          byte = (r // 64, G, a, b, gl, gh),      nibble = h
8-bit:  g = (G, g8: 2, gq: 4, gn: 2);   byte = (r // 64, G, a, b, gq, g8, h),   nibble = gn
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
# The smallest normal number: its reciprocal, a scale, is finite.
SMALLEST_SCALE_INV = 2.0**-126

ROW_MULTIPLE = 64
# A metadata block covers 64 rows and this many columns (twice that many bytes of one row).
COLUMN_MULTIPLE = {torch.bfloat16: 64, torch.float16: 64, E4M3: 128}


@dataclass(frozen=True, eq=False)
class Packed24:
    """A 2:4 matrix (N, K): the two kept entries of each group of 4, and where they were.

    values: (N, K / 2) of `dtype`, row-major; the kept entries in ascending column order.
    metadata: (N * K / 8,) uint8, one 4-bit code `i0 | i1 << 2` a group in the hardware's order.
    shape: (N, K) of the dense matrix.
    dtype: bfloat16, float16 or float8_e4m3fn.
    scale: 0-d float32, what undoes the scaling: the matrix is values * scale. 1 for 16-bit formats.
        (Arguments and results of functions call this number `scale_inv`.)
    """

    values: torch.Tensor
    metadata: torch.Tensor
    shape: tuple[int, int]
    dtype: torch.dtype
    scale: torch.Tensor

    @functools.cached_property
    def buffer(self) -> torch.Tensor:
        """(bytes,) uint8, values then metadata: what cuSPARSELt takes.

        What `pack24` makes lies in one buffer, of which `values` and `metadata` are views; parts
        that come from elsewhere are joined by a copy.
        """
        values = self.values.view(torch.uint8).view(-1)
        if not self.in_one_buffer:
            return torch.cat([values, self.metadata])
        total = values.numel() + self.metadata.numel()
        return values.as_strided((total,), (1,), values.storage_offset())

    @property
    def in_one_buffer(self) -> bool:
        """Whether the metadata follow the values in memory: `buffer` is then a view."""
        end = self.values.data_ptr() + self.values.numel() * self.values.itemsize
        storages = (t.untyped_storage().data_ptr() for t in (self.values, self.metadata))
        return self.metadata.data_ptr() == end and len(set(storages)) == 1

    def copy_(self, other: Packed24) -> Packed24:
        """Take over values, metadata and scale of one of the same shape and dtype, in place."""
        self.values.copy_(other.values)
        self.metadata.copy_(other.metadata)
        self.scale.copy_(other.scale)
        return self

    def dense(self) -> torch.Tensor:
        """The (N, K) matrix: of `dtype` for 16 bits, float32 (values * scale) for 8. Any device.

        The definition of `unpack24`.
        """
        w = self.stored()
        return w if self.dtype.itemsize == 2 else w.float() * self.scale

    def stored(self) -> torch.Tensor:
        """The (N, K) matrix of `dtype`, without the scale. Any device."""
        rows, columns = self.shape
        codes = metadata_to_codes(self.metadata, self.shape, self.dtype).long()
        index = torch.stack([codes & 3, codes >> 2], -1)
        # By bits: torch does not scatter e4m3.
        bits = self.values.view(torch.int16 if self.dtype.itemsize == 2 else torch.int8)
        dense = bits.new_zeros(rows, columns // 4, 4)
        dense.scatter_(-1, index, bits.reshape(rows, columns // 4, 2))
        return dense.view(rows, columns).view(self.dtype)


@functools.cache
def unit_scale(device: torch.device) -> torch.Tensor:
    """The scale of 16-bit formats, 0-d float32; one for all, not to be changed."""
    return torch.ones((), dtype=torch.float32, device=device)


def empty_packed(
    shape: tuple[int, int], dtype: torch.dtype, scale: torch.Tensor, device: torch.device
) -> Packed24:
    """A Packed24 in one uninitialized buffer."""
    buffer = torch.empty(packed_bytes(shape, dtype), dtype=torch.uint8, device=device)
    return packed_in(buffer, shape, dtype, scale)


def packed_bytes(shape: tuple[int, int], dtype: torch.dtype) -> int:
    """Of a Packed24 in one buffer: values and metadata."""
    rows, columns = shape
    return rows * (columns // 2) * dtype.itemsize + rows * columns // 8


def packed_in(
    buffer: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype, scale: torch.Tensor
) -> Packed24:
    """A Packed24 in a buffer of `packed_bytes`, uint8."""
    rows, columns = shape
    value_bytes = rows * (columns // 2) * dtype.itemsize
    values = buffer[:value_bytes].view(dtype).view(rows, columns // 2)
    packed = Packed24(values, buffer[value_bytes:], shape, dtype, scale)
    packed.__dict__["buffer"] = buffer  # what the property would find, by more steps
    return packed


def parts_of(packed: Packed24, counts: Sequence[int]) -> tuple[Packed24, ...]:
    """The memory of a Packed24 (N, T') as those of parts (N, T_e), one after the other.

    Args:
        counts: T_e of each, multiples of `COLUMN_MULTIPLE`.
    """
    sizes = [packed_bytes((packed.shape[0], count), packed.dtype) for count in counts]
    shapes = [(packed.shape[0], count) for count in counts]
    return tuple(
        packed_in(buffer, shape, packed.dtype, packed.scale)
        for buffer, shape in zip(packed.buffer.split(sizes), shapes, strict=True)
    )


@dataclass(frozen=True, eq=False)
class PackedStack:
    """2:4 matrices of one shape (N, K), one after the other in memory; they share their scale.

    buffer: (E, `packed_bytes`) uint8, contiguous.
    each: the matrices, views of it.
    """

    buffer: torch.Tensor
    each: tuple[Packed24, ...]

    @classmethod
    def empty(
        cls,
        count: int,
        shape: tuple[int, int],
        dtype: torch.dtype,
        scale: torch.Tensor,
        device: torch.device,
    ) -> PackedStack:
        """Of `count` matrices, uninitialized."""
        size = packed_bytes(shape, dtype)
        buffer = torch.empty(count, size, dtype=torch.uint8, device=device)
        return cls(buffer, tuple(packed_in(one, shape, dtype, scale) for one in buffer))


def join_packed(values: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> Packed24:
    """A Packed24 in one buffer, of what the groups keep.

    Args:
        values: (N, K / 2), of one of the three dtypes.
        codes: (N, K / 4) uint8, 4 bits a group.
        scale: 0-d float32, kept in the result.
    """
    shape = (values.shape[0], 2 * values.shape[1])
    packed = empty_packed(shape, values.dtype, scale, values.device)
    packed.values.copy_(values)
    packed.metadata.copy_(codes_to_metadata(codes, values.dtype))
    return packed


def codes_to_metadata(codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Metadata bytes (N * K / 8,) from one 4-bit code a group, (N, K / 4) uint8."""
    rows, groups = codes.shape
    if dtype.itemsize == 2:
        c = codes.view(rows // 64, 4, 2, 8, groups // 8, 2, 4)
        return (c[:, :, 0] | c[:, :, 1] << 4).permute(0, 3, 1, 2, 5, 4).reshape(-1)
    c = codes.view(rows // 64, 4, 2, 8, groups // 16, 2, 4, 2)
    return (c[..., 0] | c[..., 1] << 4).permute(0, 4, 1, 3, 6, 5, 2).reshape(-1)


def metadata_to_codes(
    metadata: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    """The inverse of `codes_to_metadata` for a dense matrix of `shape`."""
    rows, groups = shape[0], shape[1] // 4
    if dtype.itemsize == 2:
        c = metadata.view(rows // 64, groups // 8, 4, 8, 4, 2).permute(0, 2, 3, 1, 5, 4)
        return torch.stack([c & 15, c >> 4], 2).reshape(rows, groups)
    c = metadata.view(rows // 64, groups // 16, 4, 8, 4, 2, 2).permute(0, 2, 6, 3, 1, 5, 4)
    return torch.stack([c & 15, c >> 4], -1).reshape(rows, groups)
