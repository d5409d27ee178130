"""One rank's file of a checkpoint: tensors, and in its header the list of the pieces they are.

The manifest has size and header digest of the file, the header the digest of every tensor. So each
file is complete in itself, and a reader opens no other to know what is in it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megasparse.checkpoint.pieces import Piece, Run, Stored, common
from megasparse.errors import CheckpointError
from megasparse.tensor_files import SafetensorError, TensorFile, raw_bytes

PIECES = "pieces"  # of the header's metadata


def describe(pieces: dict[str, Piece]) -> Callable[[dict[str, str]], dict[str, Any]]:
    """The pieces of a file by entry, as `write_tensors` asks for them, given the digests."""

    def metadata(digests: dict[str, str]) -> dict[str, Any]:
        records = [pieces[entry].to_json(entry, digest) for entry, digest in digests.items()]
        return {PIECES: json.dumps(records, separators=(",", ":"))}

    return metadata


class RankFile:
    """A file whose header is as the manifest says.

    Args:
        path: of the file.
        expected: what the manifest says of it.
        records: of its pieces, where the manifest has them (the old format); None: its header has.

    Attributes:
        pieces: what it holds.

    Raises:
        CheckpointError: missing, damaged, or no such file.
    """

    def __init__(
        self, path: Path, expected: dict[str, Any], records: list[Any] | None = None
    ) -> None:
        self.path = path
        self._stream: TensorFile | None = None
        self._check_size(expected["size"])
        stream = self._open()
        if stream.header_sha256 != expected["header_sha256"]:
            raise CheckpointError(f"{path}: damaged: wrong sha256 of the header")
        try:
            found = json.loads(stream.metadata[PIECES]) if records is None else records
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise CheckpointError(f"{path}: no list of pieces: {error!r}") from None
        if not isinstance(found, list):
            raise CheckpointError(f"{path}: no list of pieces")
        self._entries, self._places = stream.entries, stream.places
        self.pieces = [Stored.of(record, str(path)) for record in found]
        for stored in self.pieces:
            self._check(stored)

    def close(self) -> None:
        """Close the file; it is opened again when it is read."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def verify(self, told: Callable[[int], object] = lambda _: None) -> None:
        """Compare the digest of every tensor.

        Args:
            told: called with the bytes of each.

        Raises:
            CheckpointError: names file and tensor.
        """
        for stored in self.pieces:
            self._compare(stored, self._try(functools.partial(_digest, stored.entry)))
            told(self._entries[stored.entry].nbytes)

    def dtype(self, stored: Stored) -> torch.dtype:
        """Of a piece."""
        return self._entries[stored.entry].dtype

    def place(self, stored: Stored) -> int:
        """Where the values of a piece begin, in bytes from the file's start."""
        return self._places[stored.entry]

    def read_values(self, entry: str, begin: int, end: int) -> torch.Tensor:
        """Values `begin` to `end` of an entry, 1-D; not compared with any digest.

        Raises:
            CheckpointError: damaged.
        """
        values: torch.Tensor = self._try(functools.partial(_part, entry, begin, end))
        return values

    def read(self, stored: Stored) -> torch.Tensor:
        """All values of a piece, 1-D, compared with their digest.

        Raises:
            CheckpointError: damaged.
        """
        values: torch.Tensor = self._try(lambda s: s.read(stored.entry))
        self._compare(stored, hashlib.sha256(raw_bytes(values)).hexdigest())
        return values

    def read_common(self, stored: Stored, wanted: Piece, target: torch.Tensor) -> list[Run]:
        """Read what a piece has of the wanted one, and nothing else.

        A whole piece is compared with its digest; of parts only `verify` can tell.

        Args:
            target: gets the values, 1-D, of the wanted piece's size and dtype.

        Returns:
            Which entries were read.
        """
        runs = list(common(wanted, stored.piece))
        if sum(run.length for run in runs) == stored.piece.numel:
            values = self.read(stored)
            for run in runs:
                target[run.wanted : run.wanted + run.length] = values[
                    run.stored : run.stored + run.length
                ]
            return runs
        for run in runs:
            begin, end = run.stored, run.stored + run.length
            values = self.read_values(stored.entry, begin, end)
            target[run.wanted : run.wanted + run.length] = values
        return runs

    def _compare(self, stored: Stored, digest: str) -> None:
        if digest != stored.sha256:
            raise CheckpointError(f"{self.path}: damaged: tensor {stored.entry}: wrong sha256")

    def _check(self, stored: Stored) -> None:
        entry = self._entries.get(stored.entry)
        if entry is None:
            raise CheckpointError(f"{self.path}: holds no tensor {stored.entry!r}")
        if entry.nbytes != stored.piece.numel * entry.dtype.itemsize:
            raise CheckpointError(
                f"{self.path}: {stored.entry} has shape {entry.shape}, expected "
                f"{stored.piece.numel} values"
            )

    def _check_size(self, expected: int) -> None:
        try:
            status = os.lstat(self.path)
        except OSError:
            raise CheckpointError(f"{self.path}: missing, expected {expected} bytes") from None
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{self.path}: not a regular file")
        if status.st_size != expected:
            raise CheckpointError(f"{self.path}: found {status.st_size} bytes, expected {expected}")

    def _open(self) -> TensorFile:
        stream: TensorFile = self._try(lambda s: s)
        return stream

    def _try(self, work: Callable[[TensorFile], Any]) -> Any:
        try:
            if self._stream is None:
                self._stream = TensorFile(self.path)
            return work(self._stream)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read: {error.strerror}") from None
        except SafetensorError as error:
            raise CheckpointError(f"{self.path}: damaged: {error}") from None


def _digest(entry: str, stream: TensorFile) -> str:
    return stream.sha256(entry)


def _part(entry: str, begin: int, end: int, stream: TensorFile) -> torch.Tensor:
    return stream.read(entry, begin, end)
