"""Checkpoint files: safetensors and JSON, every byte under a checksum, verified before use.

A checkpoint is a folder `step-00000100` with one safetensors file a rank and `manifest.json`. The
manifest holds size and header digest of every file and, for every tensor, its SHA-256 and which
piece of the whole it is. So a reader can take any tensor whole, whatever the layout that wrote it,
and damage is found by the name of tensor and file.
"""

from __future__ import annotations

import hashlib
import math
import os
import stat
from pathlib import Path
from typing import Any

import torch

from megasparse.checkpoint.manifest import FILE_FIELDS, MANIFEST, read_manifest, shard_of
from megasparse.errors import CheckpointError
from megasparse.log import is_logging_rank
from megasparse.progress import progress
from megasparse.sparsity.shard import WeightShard
from megasparse.tensor_files import SafetensorError, raw_bytes, safe_open


class CheckpointReader:
    """A verified checkpoint: whole tensors by key.

    Args:
        folder: of one checkpoint.
        verify: compare the digest of every tensor now (one pass over the bytes); `read` does so
            for what it reads in any case.

    Raises:
        CheckpointError: names the damaged file and tensor.
    """

    def __init__(self, folder: Path, verify: bool = True) -> None:
        self.folder = folder
        if folder.is_symlink():
            raise CheckpointError(f"{folder}: found a link, expected a folder")
        self._index(read_manifest(folder / MANIFEST))
        if verify:
            self.verify(self.files)

    @classmethod
    def of_files(cls, folder: Path, records: list[dict[str, Any]]) -> CheckpointReader:
        """The files of a checkpoint in the making, by what their writers said of them."""
        reader = cls.__new__(cls)
        reader.folder = folder
        files = {r["file"]: {k: r[k] for k in FILE_FIELDS} for r in records}
        reader._index({"files": files, "pieces": [p for r in records for p in r["pieces"]]})
        return reader

    def _index(self, meta: dict[str, Any]) -> None:
        self.meta = meta
        self._pieces: dict[str, list[dict[str, Any]]] = {}
        self._by_file: dict[str, list[dict[str, Any]]] = {name: [] for name in self.meta["files"]}
        for piece in self.meta["pieces"]:
            self._pieces.setdefault(piece["key"], []).append(piece)
            self._by_file[piece["file"]].append(piece)
        for name in self._by_file:
            self._check_file(name)

    @property
    def imported(self) -> bool:
        """Whether these are weights from elsewhere, without any run's state."""
        return "imported" in self.meta["state"]

    @property
    def files(self) -> list[str]:
        """Names of the files with tensors."""
        return list(self._by_file)

    def verify(self, files: list[str]) -> None:
        """Compare the digests of all tensors in these files.

        Raises:
            CheckpointError: names file and tensor.
        """
        total = sum(self.meta["files"][name]["size"] for name in files)
        desc = f"verifying {self.folder.name}"
        with progress(desc=desc, total=total, unit="B", enabled=is_logging_rank()) as bar:
            for name in files:
                path = self.folder / name
                try:
                    with safe_open(path, framework="pt") as stream:
                        for record in self._by_file[name]:
                            bar.update(self._take(stream, record).nbytes)
                except (SafetensorError, OSError) as error:
                    raise CheckpointError(f"{path}: {error}") from None

    def keys(self, prefix: str = "") -> list[str]:
        """Keys of the stored tensors that start with `prefix`."""
        return [key for key in self._pieces if key.startswith(prefix)]

    def __contains__(self, key: str) -> bool:
        return key in self._pieces

    def dtype(self, key: str) -> str:
        """safetensors' name of a stored tensor's type, from the header of its file.

        Raises:
            CheckpointError: no such tensor, or damaged.
        """
        if key not in self._pieces:
            raise CheckpointError(f"{self.folder}: holds no tensor {key!r}")
        record = self._pieces[key][0]
        path = self.folder / record["file"]
        try:
            with safe_open(path, framework="pt") as stream:
                return stream.get_slice(record["entry"]).get_dtype()
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: {error}") from None

    def read(self, key: str) -> torch.Tensor:
        """The whole tensor, put together from its pieces, on the CPU.

        Raises:
            CheckpointError: no such tensor, damaged, or the pieces do not make it up.
        """
        if key not in self._pieces:
            raise CheckpointError(f"{self.folder}: holds no tensor {key!r}")
        parts: dict[WeightShard, torch.Tensor] = {}
        covered, numel = 0, 0
        for record in self._pieces[key]:
            shard = shard_of(record["shard"], key)
            value = self._load(record)
            covered, numel = covered + value.numel(), math.prod(shard.global_shape)
            try:
                if record["start"] is None:
                    parts[shard] = value.reshape(shard.local_shape)
                    continue
                if covered > numel:
                    break
                part = parts.setdefault(shard, torch.empty(shard.local_shape, dtype=value.dtype))
                part.view(-1)[record["start"] : record["stop"]] = value
            except (RuntimeError, TypeError) as error:
                raise CheckpointError(f"{self.folder}: {key}: {error}") from None
        if covered != numel:
            raise CheckpointError(
                f"{self.folder}: {key}: its pieces hold {covered} of {numel} values"
            )
        first = next(iter(parts.values()))
        whole = torch.empty(next(iter(parts)).global_shape, dtype=first.dtype)
        for shard, part in parts.items():
            if shard.global_shape != tuple(whole.shape):
                raise CheckpointError(f"{self.folder}: {key}: its pieces disagree on the shape")
            shard.write_into(whole, part)
        return whole

    def _load(self, record: dict[str, Any]) -> torch.Tensor:
        """One stored tensor, its own copy, with the digest that the manifest says."""
        path = self.folder / record["file"]
        try:
            with safe_open(path, framework="pt") as stream:
                return self._take(stream, record)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: {error}") from None

    def _take(self, stream: Any, record: dict[str, Any]) -> torch.Tensor:
        path = self.folder / record["file"]
        try:
            value = stream.get_tensor(record["entry"]).clone()
        except (SafetensorError, RuntimeError) as error:
            raise CheckpointError(f"{path}: {record['entry']}: {error}") from None
        if hashlib.sha256(raw_bytes(value)).hexdigest() != record["sha256"]:
            raise CheckpointError(f"{path}: damaged: tensor {record['entry']}: wrong sha256")
        return value

    def _check_file(self, name: str) -> None:
        """Size and header; the size before anything is mapped, since a short file kills then."""
        path, expected = self.folder / name, self.meta["files"][name]
        try:
            status = os.lstat(path)
        except OSError:
            raise CheckpointError(f"{path}: missing, expected {expected['size']} bytes") from None
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path}: not a regular file")
        if status.st_size != expected["size"]:
            raise CheckpointError(
                f"{path}: found {status.st_size} bytes, expected {expected['size']}"
            )
        try:
            with open(path, "rb") as stream:
                prefix = stream.read(8)
                length = int.from_bytes(prefix, "little")
                header = stream.read(length) if length <= status.st_size else b""
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
        if hashlib.sha256(prefix + header).hexdigest() != expected["header_sha256"]:
            raise CheckpointError(f"{path}: damaged: wrong sha256 of the header")
