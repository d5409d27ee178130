"""Safetensors files: read tensor by tensor, written as a stream. The only door to safetensors.

Writing needs the tensors' names, dtypes and shapes beforehand and their values one by one, so a
file of any size is written with memory for one tensor.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

__all__ = ["DTYPES", "Entry", "SafetensorError", "raw_bytes", "safe_open", "write_tensors"]

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: its name, and what its values take."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> Entry:
        """The entry of a tensor; one on the meta device will do."""
        return cls(name, tensor.dtype, tuple(tensor.shape))

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return math.prod(self.shape) * self.dtype.itemsize


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """A tensor's values as they lie in memory, row by row."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy().data) if flat.numel() else memoryview(b"")


def write_tensors(
    stream: BinaryIO,
    entries: Sequence[Entry],
    read: Callable[[str], torch.Tensor],
    metadata: dict[str, Any],
    after: Callable[[], None] = lambda: None,
) -> tuple[str, dict[str, str]]:
    """Write a safetensors file, one tensor at a time.

    Args:
        entries: what the file holds.
        read: the values of an entry, asked for once each.
        metadata: of the header; values are written as text.
        after: called after every tensor.

    Returns:
        SHA-256 of the header (with its length), and that of every tensor's values by name.

    Raises:
        OSError: cannot be written.
    """
    # Wide types first: an entry must start at a multiple of its own size.
    ordered = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
    header = _header(ordered, metadata)
    stream.write(header)
    digests = {}
    for entry in ordered:
        value = read(entry.name)
        assert Entry.of(entry.name, value) == entry, (entry, value.dtype, tuple(value.shape))
        content = raw_bytes(value)
        stream.write(content)
        digests[entry.name] = hashlib.sha256(content).hexdigest()
        after()
    return hashlib.sha256(header).hexdigest(), digests


def _header(ordered: Sequence[Entry], metadata: dict[str, Any]) -> bytes:
    """safetensors: u64 length, then JSON padded with spaces to a multiple of 8."""
    body: dict[str, Any] = {"__metadata__": {key: str(value) for key, value in metadata.items()}}
    offset = 0
    for entry in ordered:
        body[entry.name] = {
            "dtype": DTYPES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.nbytes],
        }
        offset += entry.nbytes
    text = json.dumps(body, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
