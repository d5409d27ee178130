"""2:4 matrices on disk in half the space, for consumers that ask for one of these layouts.

    hopper    NAME.weight.values (N, K/2), NAME.weight.metadata (N K/8,) uint8: the layout of
              `kernels.packed24`
    torch     NAME.weight.packed (N, K/2), NAME.weight.meta (N, K/16) int16: torch's
              SparseSemiStructuredTensor in its CUTLASS layout

NAME.weight is (N, K), and (out, in) also where the architecture stores it the other way round. All
that is packed is unpacked again and compared, so what is written is known to be the weight.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from megasparse.errors import CheckpointError
from megasparse.kernels import pack24, unpack24
from megasparse.kernels.packed24 import COLUMN_MULTIPLE, ROW_MULTIPLE, Packed24
from megasparse.tensor_files import Entry

Tensors = dict[str, torch.Tensor]
SIXTEEN_BIT = (torch.bfloat16, torch.float16)


class Packing(Protocol):
    """One layout."""

    def refusal(self, shape: tuple[int, ...], dtype: torch.dtype) -> str | None:
        """Why a matrix cannot be packed; None if it can."""
        ...

    def entries(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Entry, ...]:
        """What is stored in place of `name`."""
        ...

    def pack(self, name: str, w: torch.Tensor) -> Tensors:
        """The stored tensors of a 2:4 matrix."""
        ...

    def unpack(self, name: str, stored: Tensors) -> torch.Tensor:
        """The matrix again."""
        ...


class Hopper:
    """cuSPARSELt's layout on Hopper, which `kernels.spmm24` multiplies with."""

    def refusal(self, shape: tuple[int, ...], dtype: torch.dtype) -> str | None:
        if dtype not in SIXTEEN_BIT:
            return f"is {dtype}, expected bfloat16 or float16 (--dtype)"
        multiples = (ROW_MULTIPLE, COLUMN_MULTIPLE[dtype])
        if any(size % multiple for size, multiple in zip(shape, multiples, strict=True)):
            return f"has shape {shape}, expected multiples of {multiples}"
        return None

    def entries(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Entry, ...]:
        rows, columns = shape
        return (
            Entry(f"{name}.values", dtype, (rows, columns // 2)),
            Entry(f"{name}.metadata", torch.uint8, (rows * columns // 8,)),
        )

    def pack(self, name: str, w: torch.Tensor) -> Tensors:
        packed = pack24(w)
        return {f"{name}.values": packed.values, f"{name}.metadata": packed.metadata}

    def unpack(self, name: str, stored: Tensors) -> torch.Tensor:
        return unpack_hopper(stored[f"{name}.values"], stored[f"{name}.metadata"])


class TorchSemiStructured:
    """What `torch.sparse.SparseSemiStructuredTensorCUTLASS` holds."""

    def refusal(self, shape: tuple[int, ...], dtype: torch.dtype) -> str | None:
        if dtype not in SIXTEEN_BIT:
            return f"is {dtype}, expected bfloat16 or float16 (--dtype)"
        if shape[0] % 32 or shape[1] % 64:
            return f"has shape {shape}, expected multiples of (32, 64)"
        return None

    def entries(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Entry, ...]:
        rows, columns = shape
        return (
            Entry(f"{name}.packed", dtype, (rows, columns // 2)),
            Entry(f"{name}.meta", torch.int16, (rows, columns // 16)),
        )

    def pack(self, name: str, w: torch.Tensor) -> Tensors:
        packed, meta = sparse_semi_structured_from_dense_cutlass(w)
        return {f"{name}.packed": packed, f"{name}.meta": meta}

    def unpack(self, name: str, stored: Tensors) -> torch.Tensor:
        return unpack_torch(stored[f"{name}.packed"], stored[f"{name}.meta"])


FORMATS: dict[str, Packing] = {
    "hopper": Hopper(),
    "torch": TorchSemiStructured(),
}


def pack_checked(packing: Packing, name: str, w: torch.Tensor) -> Tensors:
    """The stored tensors of a 2:4 matrix, known to give the matrix back.

    Raises:
        CheckpointError: they do not.
    """
    stored = packing.pack(name, w)
    if not torch.equal(packing.unpack(name, stored), w):
        raise CheckpointError(f"{name}: what was packed is not the weight")
    return stored


def unpack_hopper(values: torch.Tensor, metadata: torch.Tensor) -> torch.Tensor:
    """The (N, K) matrix of the hopper format."""
    shape = (values.shape[0], values.shape[1] * 2)
    scale = torch.ones((), device=values.device)
    return unpack24(Packed24(values, metadata, shape, values.dtype, scale))


def unpack_torch(packed: torch.Tensor, meta: torch.Tensor) -> torch.Tensor:
    """The (N, K) matrix of the torch format.

    The tensor itself, on a GPU: `SparseSemiStructuredTensorCUTLASS(shape, packed, meta, None,
    None, None)`.
    """
    return sparse_semi_structured_to_dense_cutlass(packed, meta)
