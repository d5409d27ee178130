"""Safetensors files: read whole or by ranges, written as a stream. The only door to safetensors.

Writing needs the tensors' names, dtypes and shapes beforehand and their values one by one, so a
file of any size is written with memory for one tensor.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from megasparse.extras import missing

try:
    from safetensors import SafetensorError, safe_open
except ImportError:
    raise missing("safetensors", "megasparse.tensor_files") from None

__all__ = [
    "DTYPES",
    "MAX_HEADER_BYTES",
    "Entry",
    "SafetensorError",
    "TensorFile",
    "raw_bytes",
    "safe_open",
    "write_tensors",
]

MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
_CHUNK = 16 << 20

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


class TensorFile:
    """An open safetensors file, read by position: one `open`, any range of a tensor's values.

    Nothing is mapped: a mapped file that is cut off while it is read kills the process.

    Args:
        path: no link is followed.

    Attributes:
        size: bytes of the file.
        header_sha256: of the header, with its length.
        metadata: texts of the header.
        entries: what the file holds, by name, in the order of the header.
        places: where the values of each begin, in bytes from the file's start.

    Raises:
        OSError: cannot be opened or read. SafetensorError: not such a file, one line.
    """

    def __init__(self, path: Path) -> None:
        # A pipe in the file's place shall not be waited for.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        self._descriptor = os.open(path, flags)
        try:
            self._read_header()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file, once."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Values `start` to `stop` of a flattened tensor, 1-D, on the CPU."""
        entry = self.entries[name]
        stop = math.prod(entry.shape) if stop is None else stop
        width = entry.dtype.itemsize
        content = bytearray((stop - start) * width)
        self._fill(memoryview(content), self.places[name] + start * width)
        if not content:
            return torch.empty(0, dtype=entry.dtype)
        return torch.frombuffer(content, dtype=torch.uint8).view(entry.dtype)

    def sha256(self, name: str) -> str:
        """Digest of a tensor's values, with memory for a part of them."""
        digest, begin = hashlib.sha256(), self.places[name]
        left = self.entries[name].nbytes
        # No larger than the tensor: a run has thousands of small ones, and memory is zeroed first.
        buffer = memoryview(bytearray(min(left, _CHUNK)))
        while left:
            part = buffer[:left]
            self._fill(part, begin)
            digest.update(part)
            begin, left = begin + len(part), left - len(part)
        return digest.hexdigest()

    def _fill(self, target: memoryview, position: int) -> None:
        while target:
            count = os.preadv(self._descriptor, [target], position)
            if not count:
                raise SafetensorError("ends before its header says so")
            target, position = target[count:], position + count

    def _read_header(self) -> None:
        status = os.fstat(self._descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise SafetensorError("not a regular file")
        self.size = status.st_size
        prefix = os.pread(self._descriptor, 8, 0)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(self.size - 8, MAX_HEADER_BYTES):
            self.header_sha256 = hashlib.sha256(prefix).hexdigest()
            raise SafetensorError(f"its header would have {length} bytes")
        header = bytearray(length)
        self._fill(memoryview(header), 8)
        self.header_sha256 = hashlib.sha256(prefix + header).hexdigest()
        try:
            body = json.loads(header)
            self.metadata: dict[str, str] = dict(body.pop("__metadata__", {}))
            places = {name: (_entry(name, of), *of["data_offsets"]) for name, of in body.items()}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise SafetensorError(f"damaged header: {' '.join(str(error).split())}") from None
        self.entries = {name: entry for name, (entry, _, _) in places.items()}
        self.places = {name: 8 + length + begin for name, (_, begin, _) in places.items()}
        expected = 0
        for name, (entry, begin, end) in sorted(places.items(), key=lambda place: place[1][1:]):
            if begin != expected or end - begin != entry.nbytes:
                raise SafetensorError(f"damaged header: {name} has a wrong place")
            expected = end
        if 8 + length + expected != self.size:
            raise SafetensorError("its tensors do not fill it")


def _entry(name: str, found: dict[str, Any]) -> Entry:
    """An entry of a header; ValueError for what is none."""
    kinds = {text: dtype for dtype, text in DTYPES.items()}
    shape, offsets = found["shape"], found["data_offsets"]
    numbers = [*shape, *offsets]
    if len(offsets) != 2 or any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError(f"{name}: {shape} at {offsets}")
    return Entry(name, kinds[found["dtype"]], tuple(shape))


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
    describe: Callable[[dict[str, str]], dict[str, Any]] = lambda digests: {},
) -> tuple[str, dict[str, str]]:
    """Write a safetensors file, one tensor at a time.

    Args:
        stream: can be written at any position.
        entries: what the file holds.
        read: the values of an entry, asked for once each.
        metadata: of the header; values are written as text.
        describe: more metadata, given the SHA-256 of every tensor's values. The header is written
            first, with digests of zeros, and again at the end: its length must be the same.
        after: called after every tensor.

    Returns:
        SHA-256 of the header (with its length), and that of every tensor's values by name.

    Raises:
        OSError: cannot be written. SafetensorError: the header is longer than readers take.
    """
    # Wide types first: an entry must start at a multiple of its own size.
    ordered = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
    digests = dict.fromkeys((entry.name for entry in ordered), "0" * 64)
    header = _header(ordered, metadata | describe(digests))
    stream.write(header)
    for entry in ordered:
        value = read(entry.name)
        assert Entry.of(entry.name, value) == entry, (entry, value.dtype, tuple(value.shape))
        content = raw_bytes(value)
        stream.write(content)
        digests[entry.name] = hashlib.sha256(content).hexdigest()
        after()
    final = _header(ordered, metadata | describe(digests))
    assert len(final) == len(header)
    if final != header:
        stream.seek(0)
        stream.write(final)
        stream.seek(0, os.SEEK_END)
    return hashlib.sha256(final).hexdigest(), digests


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
    if len(text) > MAX_HEADER_BYTES:
        raise SafetensorError(
            f"{len(body)} entries make a header of {len(text)} bytes, readers take "
            f"{MAX_HEADER_BYTES}"
        )
    return len(text).to_bytes(8, "little") + text
