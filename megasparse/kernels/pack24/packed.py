"""The compressed 2:4 matrix as Hopper's sparse tensor cores and cuSPARSELt 0.8 read it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0

ROW_MULTIPLE = 64
# A metadata block covers 64 rows and this many columns (twice that many bytes of one row).
COLUMN_MULTIPLE = {torch.bfloat16: 64, torch.float16: 64, E4M3: 128}


@dataclass(frozen=True)
class Packed24:
    """A 2:4 matrix (N, K): the two kept entries of each group of 4, and where they were.

    values: (N, K / 2) of `dtype`, row-major; the kept entries in ascending column order.
    metadata: (N * K / 8,) uint8, one 4-bit code `i0 | i1 << 2` a group in the hardware's order.
    shape: (N, K) of the dense matrix.
    dtype: bfloat16, float16 or float8_e4m3fn.
    scale: 0-d float32; the matrix is values * scale. 1 for 16-bit formats.
    """

    values: torch.Tensor
    metadata: torch.Tensor
    shape: tuple[int, int]
    dtype: torch.dtype
    scale: torch.Tensor

    @property
    def buffer(self) -> torch.Tensor:
        """(bytes,) uint8, values then metadata: what cuSPARSELt takes.

        What `pack24` makes lies in one buffer, of which `values` and `metadata` are views; parts
        that come from elsewhere are joined by a copy.
        """
        values = self.values.view(torch.uint8).view(-1)
        adjacent = self.metadata.data_ptr() == values.data_ptr() + values.numel()
        same = self.metadata.untyped_storage().data_ptr() == values.untyped_storage().data_ptr()
        if not (adjacent and same):
            return torch.cat([values, self.metadata])
        total = values.numel() + self.metadata.numel()
        return values.as_strided((total,), (1,), values.storage_offset())


def empty_packed(
    shape: tuple[int, int], dtype: torch.dtype, scale: torch.Tensor, device: torch.device
) -> Packed24:
    """A Packed24 in one uninitialised buffer."""
    rows, columns = shape
    value_bytes = rows * (columns // 2) * dtype.itemsize
    buffer = torch.empty(value_bytes + rows * columns // 8, dtype=torch.uint8, device=device)
    values = buffer[:value_bytes].view(dtype).view(rows, columns // 2)
    return Packed24(values, buffer[value_bytes:], shape, dtype, scale)
