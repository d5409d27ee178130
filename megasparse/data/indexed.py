"""Reading and checking Megatron's indexed datasets: `<prefix>.bin` and `<prefix>.idx`.

Layout of the `.idx`, little-endian (`megatron.core.datasets.indexed_dataset`):

    9 bytes   "MMIDIDX\\0\\0"
    u64       version, 1
    u8        code of the tokens' dtype (`DTYPE_CODES`)
    u64       number of sequences, S
    u64       number of document boundaries, D (documents + 1)
    i32 x S   tokens of each sequence
    i64 x S   byte offset of each sequence in the .bin
    i64 x D   index of each document's first sequence; starts with 0 and ends with S

The `.bin` is the tokens, nothing else. Megatron checks almost none of it, and a file that is cut
while it is mapped kills the process with SIGBUS, so sizes are compared before anything is mapped,
and counts with the size before anything is allocated.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megasparse.data.file_errors import read_error
from megasparse.data.sidecar import bin_path, idx_path
from megasparse.errors import DataError
from megasparse.input_files import open_regular
from megasparse.log import is_logging_rank
from megasparse.progress import progress

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")

DTYPE_CODES: dict[int, np.dtype] = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.int8),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
FLOAT_CODES = (6, 7)  # float64 and float32: in the format, but no tokens

# Elements compared at a time, so that checking an index of any size takes little memory.
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Index:
    """A dataset's index, mapped from its file.

    Attributes:
        prefix: path of the dataset without `.bin`.
        dtype: of the tokens.
        lengths: (S,) int32, tokens of each sequence.
        pointers: (S,) int64, byte offsets in the `.bin`.
        document_indices: (D,) int64, first sequence of each document, and S at the end.
        bin_size: bytes of the `.bin`.
    """

    prefix: str
    dtype: np.dtype
    lengths: np.ndarray
    pointers: np.ndarray
    document_indices: np.ndarray
    bin_size: int

    @property
    def num_sequences(self) -> int:
        return len(self.lengths)

    @property
    def num_documents(self) -> int:
        return len(self.document_indices) - 1

    @property
    def num_tokens(self) -> int:
        return self.bin_size // self.dtype.itemsize


def optimal_dtype(vocab_size: int) -> np.dtype:
    """Megatron's choice: uint16 below 65 500 tokens, else int32."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


def dtype_code(dtype: np.dtype) -> int:
    """The index's code of a token dtype.

    Raises:
        DataError: the format has no such integer type.
    """
    for code, known in DTYPE_CODES.items():
        if known == np.dtype(dtype):
            return code
    expected = ", ".join(str(known) for known in DTYPE_CODES.values())
    raise DataError(f"dtype: found {np.dtype(dtype)}, expected one of {expected}")


def read_index(prefix: str | os.PathLike) -> Index:
    """Map the index of a dataset after checking its header and all sizes.

    The values in the arrays are not looked at; `validate` does that.

    Raises:
        DataError: one of the two files is missing or unreadable; wrong magic, version or dtype;
            counts that do not fit the file's size; no document.
    """
    bin_size = _size(bin_path(prefix))
    path = idx_path(prefix)
    try:
        with open_regular(path) as stream:
            size = os.fstat(stream.fileno()).st_size
            dtype, sequences, boundaries = _parse_header(stream.read(HEADER.size), size, path)
            buffer = np.memmap(stream, dtype=np.uint8, mode="r", shape=(size,))
    except OSError as error:
        raise read_error(path, error) from error
    split = np.cumsum([HEADER.size, 4 * sequences, 8 * sequences, 8 * boundaries])
    index = Index(
        prefix=os.fspath(prefix),
        dtype=dtype,
        lengths=buffer[split[0] : split[1]].view("<i4"),
        pointers=buffer[split[1] : split[2]].view("<i8"),
        document_indices=buffer[split[2] : split[3]].view("<i8"),
        bin_size=bin_size,
    )
    if bin_size == 0:
        raise DataError(f"{bin_path(prefix)}: found an empty file, expected tokens")
    if bin_size % dtype.itemsize:
        raise DataError(
            f"{bin_path(prefix)}: found {bin_size} bytes, expected a multiple of "
            f"{dtype.itemsize} (tokens are {dtype})"
        )
    return index


def validate(prefix: str | os.PathLike, vocab_size: int | None = None) -> Index:
    """Check every value of a dataset's index, and every token if `vocab_size` is given.

    Args:
        prefix: path of the dataset without `.bin`.
        vocab_size: tokens must be in [0, vocab_size); None does not read the tokens.

    Returns:
        The checked index.

    Raises:
        DataError: as `read_index`; or a negative length, offsets that are not the running sum of
            the lengths, a `.bin` longer or shorter than they say, document boundaries that do not
            go from 0 to the number of sequences, or a token outside of the vocabulary.
    """
    index = read_index(prefix)
    end = _check_sequences(index)
    if end != index.bin_size:
        raise DataError(
            f"{bin_path(prefix)}: found {index.bin_size} bytes, expected {end} (the .idx)"
        )
    _check_documents(index)
    if vocab_size is not None:
        _check_tokens(index, vocab_size)
    return index


def _size(path: Path) -> int:
    try:
        with open_regular(path) as stream:
            return os.fstat(stream.fileno()).st_size
    except OSError as error:
        raise read_error(path, error) from error


def _parse_header(header: bytes, size: int, path: Path) -> tuple[np.dtype, int, int]:
    """Dtype, number of sequences and number of document boundaries of an index of `size` bytes."""
    if len(header) < HEADER.size:
        raise DataError(f"{path}: found {size} bytes, expected at least {HEADER.size}")
    magic, version, code, sequences, boundaries = HEADER.unpack(header)
    if magic != MAGIC:
        raise DataError(f"{path}: found magic {magic!r}, expected {MAGIC!r}")
    if version != VERSION:
        raise DataError(f"{path}: found version {version}, expected {VERSION} (little-endian)")
    if code not in DTYPE_CODES:
        what = "a floating-point type" if code in FLOAT_CODES else "unknown"
        raise DataError(
            f"{path}: found dtype code {code} ({what}), expected one of {sorted(DTYPE_CODES)}"
        )
    expected = HEADER.size + 12 * sequences + 8 * boundaries
    if size == expected + sequences and sequences:
        raise DataError(f"{path}: found a multimodal index (one mode a sequence), expected text")
    if size != expected:
        raise DataError(
            f"{path}: found {size} bytes, expected {expected} for {sequences} sequences and "
            f"{boundaries} document boundaries"
        )
    if sequences == 0 or boundaries < 2:
        raise DataError(
            f"{path}: found {sequences} sequences and {boundaries} document boundaries, expected "
            "at least one document"
        )
    return DTYPE_CODES[code], sequences, boundaries


def _check_sequences(index: Index) -> int:
    """Check lengths and offsets; returns the number of bytes that they add up to."""
    path, itemsize, end = idx_path(index.prefix), index.dtype.itemsize, 0
    for start in range(0, index.num_sequences, _CHUNK):
        lengths = index.lengths[start : start + _CHUNK].astype(np.int64)
        pointers = index.pointers[start : start + _CHUNK]
        if lengths.min() < 0:
            at = int((lengths < 0).argmax())
            raise DataError(f"{path}: sequence {start + at}: found length {lengths[at]}")
        ends = end + np.cumsum(lengths) * itemsize
        expected = np.concatenate(([end], ends[:-1]))
        if not np.array_equal(pointers, expected):
            at = int((pointers != expected).argmax())
            raise DataError(
                f"{path}: sequence {start + at}: found byte offset {pointers[at]}, expected "
                f"{expected[at]} (the sum of the lengths before)"
            )
        end = int(ends[-1])
    return end


def _check_documents(index: Index) -> None:
    path, bounds = idx_path(index.prefix), index.document_indices
    if bounds[0] != 0 or bounds[-1] != index.num_sequences:
        raise DataError(
            f"{path}: found document boundaries from {bounds[0]} to {bounds[-1]}, expected from 0 "
            f"to {index.num_sequences}"
        )
    for start in range(0, len(bounds) - 1, _CHUNK):
        here = bounds[start : start + _CHUNK + 1]
        decreasing = here[1:] < here[:-1]
        if decreasing.any():
            at = int(decreasing.argmax())
            raise DataError(
                f"{path}: document {start + at}: found boundaries {here[at]} and {here[at + 1]}, "
                "expected them not to decrease"
            )


def _check_tokens(index: Index, vocab_size: int) -> None:
    path = bin_path(index.prefix)
    tokens = np.memmap(path, dtype=index.dtype, mode="r", shape=(index.num_tokens,))
    starts = range(0, index.num_tokens, _CHUNK)
    desc = f"checking {path.name}"
    for start in progress(starts, desc=desc, unit="chunk", enabled=is_logging_rank(), leave=False):
        chunk = tokens[start : start + _CHUNK]
        low, high = int(chunk.min()), int(chunk.max())
        if low < 0 or high >= vocab_size:
            wrong = (chunk < 0) | (chunk >= vocab_size)
            at = int(wrong.argmax())
            raise DataError(
                f"{path}: token {start + at}: found id {chunk[at]}, expected 0 to {vocab_size - 1}"
            )
