"""Writing Megatron's indexed datasets, whole or not at all.

The bytes are those of `megatron.core.datasets.indexed_dataset.IndexedDatasetBuilder` for documents
of one sequence each. Tokens are streamed to a temporary file and hashed on the way; the three
files get their names at the end, the `.idx` last: without an `.idx` nothing takes the rest for a
dataset.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from array import array
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from megasparse.atomic_files import discard, rename, sync, temporary_path
from megasparse.data.file_errors import write_error
from megasparse.data.indexed import HEADER, MAGIC, VERSION, dtype_code
from megasparse.data.sidecar import Chat, Sidecar, bin_path, idx_path, mask_path, sidecar_path
from megasparse.data.tokenizers.tokenizer import Tokenizer
from megasparse.errors import DataError

_CHUNK = 1 << 20  # index entries written at a time


@dataclass(frozen=True)
class Provenance:
    """Where a dataset's tokens come from, for its sidecar.

    Attributes:
        chat_template: of conversations; their dataset has a mask.
    """

    tokenizer: Tokenizer
    append_eod: bool
    source: str
    chat_template: str | None = None


class _HashedFile:
    """A temporary file that is hashed while it is written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.temporary = temporary_path(path)
        self.size = 0
        self._digest = hashlib.sha256()
        try:
            if not path.parent.exists():  # a file in its place: opening says so
                path.parent.mkdir(parents=True, exist_ok=True)
            self._stream: BinaryIO = open(self.temporary, "wb")  # noqa: SIM115 (closed below)
        except OSError as error:
            raise write_error(path, error) from error

    def write(self, content: bytes | memoryview) -> None:
        try:
            self._stream.write(content)
        except OSError as error:
            raise write_error(self.path, error) from error
        self._digest.update(content)
        self.size += len(content)

    def close(self) -> str:
        """Flush to the disk and return the SHA-256."""
        try:
            sync(self._stream)
            self._stream.close()
        except OSError as error:
            raise write_error(self.path, error) from error
        return self._digest.hexdigest()

    def publish(self) -> None:
        rename(self.temporary, self.path)

    def discard(self) -> None:
        with suppress(OSError):  # a full disk fails again while flushing; the file goes anyway
            self._stream.close()
        discard(self.temporary)


class IndexedDatasetWriter:
    """Streams documents into `<prefix>.bin` and `.idx`, and a sidecar if `finish` is told of one.

    A context manager: leaving it before `finish`, by an error or not, removes all it wrote.

    Args:
        prefix: path of the dataset without `.bin`; its directory is created.
        dtype: of the tokens, one of `indexed.DTYPE_CODES`.
        masked: write `<prefix>.mask` too: a byte for each token, 1 where its prediction has a loss.

    Raises:
        DataError: also from the methods, when a file cannot be written.
    """

    def __init__(
        self, prefix: str | os.PathLike, dtype: np.dtype | type, masked: bool = False
    ) -> None:
        self.prefix = os.fspath(prefix)
        self.dtype = np.dtype(dtype)
        self._code = dtype_code(self.dtype)
        self._lengths = array("i")
        self._bin = _HashedFile(bin_path(prefix))
        self._files = [self._bin]
        self._mask = self._open(mask_path(prefix)) if masked else None
        self._num_answer_tokens = 0

    @property
    def num_documents(self) -> int:
        return len(self._lengths)

    @property
    def num_tokens(self) -> int:
        return self._bin.size // self.dtype.itemsize

    def add_document(self, tokens: Sequence[int] | np.ndarray) -> None:
        """Append one document of at least one token."""
        self.add_documents(tokens, [len(tokens)])

    def add_documents(
        self,
        tokens: Sequence[int] | np.ndarray,
        lengths: Sequence[int],
        mask: np.ndarray | None = None,
    ) -> None:
        """Append documents whose tokens lie one after the other.

        Args:
            tokens: (T,) ids of all of them.
            lengths: tokens of each, all positive, adding up to T.
            mask: (T,) bool, of a masked dataset.

        Raises:
            DataError: an id that the dtype cannot hold, or lengths that do not fit.
        """
        values = np.asarray(tokens)
        if values.size and values.dtype != self.dtype:
            limits = np.iinfo(self.dtype)
            if values.dtype.kind not in "iu":
                raise DataError(f"{self.prefix}: found {values.dtype} tokens, expected integers")
            if values.min() < limits.min or values.max() > limits.max:
                raise DataError(
                    f"{self.prefix}: found token ids from {values.min()} to {values.max()}, "
                    f"expected {limits.min} to {limits.max} ({self.dtype})"
                )
        if any(not 0 < length < 2**31 for length in lengths) or sum(lengths) != values.size:
            raise DataError(
                f"{self.prefix}: found documents of {sum(lengths)} tokens in all for "
                f"{values.size} tokens, expected equal sums and lengths from 1 to 2^31 - 1"
            )
        if self._mask is not None:
            assert mask is not None and mask.shape == values.shape
            self._mask.write(np.ascontiguousarray(mask, dtype=np.uint8).data)
            self._num_answer_tokens += int(mask.sum())
        self._bin.write(np.ascontiguousarray(values, dtype=self.dtype).data.cast("B"))
        self._lengths.extend(int(length) for length in lengths)

    def finish(self, provenance: Provenance | None = None) -> Sidecar | None:
        """Write the index (and the sidecar), then give all files their names.

        Raises:
            DataError: there is no document.
        """
        if not self._lengths:
            raise DataError(f"{self.prefix}: found no documents, expected at least one")
        bin_digest = self._bin.close()
        mask_digest = None if self._mask is None else self._mask.close()
        idx = self._open(idx_path(self.prefix))
        self._write_index(idx)
        idx_digest = idx.close()
        sidecar = None
        if provenance is not None:
            chat = None
            if self._mask is not None:
                assert mask_digest is not None and provenance.chat_template is not None
                template, answers = provenance.chat_template, self._num_answer_tokens
                chat = Chat(mask_digest, self._mask.size, answers, template)
            sidecar = self._describe(provenance, bin_digest, idx_digest, idx.size, chat)
            description = self._open(sidecar_path(self.prefix))
            description.write(sidecar.to_json())
            description.close()
        self._publish(idx)
        return sidecar

    def __enter__(self) -> IndexedDatasetWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in self._files:
            file.discard()

    def _open(self, path: Path) -> _HashedFile:
        file = _HashedFile(path)
        self._files.append(file)
        return file

    def _write_index(self, idx: _HashedFile) -> None:
        count = len(self._lengths)
        idx.write(HEADER.pack(MAGIC, VERSION, self._code, count, count + 1))
        lengths = np.frombuffer(self._lengths, dtype=np.int32)
        idx.write(lengths.astype("<i4", copy=False).data.cast("B"))
        offset = 0
        for start in range(0, count, _CHUNK):
            ends = offset + np.cumsum(lengths[start : start + _CHUNK], dtype="<i8")
            pointers = np.concatenate(([offset], ends[:-1])) * self.dtype.itemsize
            idx.write(pointers.astype("<i8", copy=False).data.cast("B"))
            offset = int(ends[-1])
        for start in range(0, count + 1, _CHUNK):
            stop = min(start + _CHUNK, count + 1)
            idx.write(np.arange(start, stop, dtype="<i8").data.cast("B"))

    def _describe(
        self,
        provenance: Provenance,
        bin_digest: str,
        idx_digest: str,
        idx_size: int,
        chat: Chat | None,
    ) -> Sidecar:
        tokenizer = provenance.tokenizer
        return Sidecar(
            bin_sha256=bin_digest,
            bin_size=self._bin.size,
            idx_sha256=idx_digest,
            idx_size=idx_size,
            dtype=self.dtype.name,
            num_documents=self.num_documents,
            num_tokens=self.num_tokens,
            tokenizer_type=tokenizer.tokenizer_type,
            tokenizer_digest=tokenizer.digest,
            vocab_size=tokenizer.vocab_size,
            append_eod=provenance.append_eod,
            source=provenance.source,
            eod=tokenizer.eod,
            bos=tokenizer.bos,
            add_bos=tokenizer.add_bos,
            parse_special=tokenizer.parse_special,
            chat=None if chat is None else dataclasses.asdict(chat),
        )

    def _publish(self, idx: _HashedFile) -> None:
        """Rename; an old index or sidecar goes first, so that old and new never form a dataset."""
        try:
            idx.path.unlink(missing_ok=True)
            sidecar_path(self.prefix).unlink(missing_ok=True)
            mask_path(self.prefix).unlink(missing_ok=True)
            for file in self._files:
                if file is not idx:
                    file.publish()
            idx.publish()
        except OSError as error:
            raise write_error(idx.path, error) from error
