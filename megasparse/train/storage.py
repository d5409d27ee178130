"""Checkpoint files: safetensors and JSON, every byte under a checksum, verified before use.

A checkpoint is a folder `step-00000100` with one safetensors file a rank and `manifest.json`. The
manifest holds size and header digest of every file and, for every tensor, its SHA-256 and which
piece of the whole it is. So a reader can take any tensor whole, whatever the layout that wrote it,
and damage is found by the name of tensor and file.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megasparse.errors import CheckpointError, ConfigError
from megasparse.log import speaks
from megasparse.progress import progress
from megasparse.sparsity.shard import WeightShard
from megasparse.tensor_files import SafetensorError, raw_bytes, safe_open

FORMAT = 2
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 1 << 30

# What a manifest says, no more and no less.
_MANIFEST: dict[str, type] = {
    "format": int, "run_id": str, "step": int, "consumed_samples": int, "layout": dict,
    "optimizer_steps": int, "digests": dict, "config": dict, "state": dict, "versions": dict,
    "files": dict, "pieces": list,
}  # fmt: skip
_FILE_NAME = re.compile(r"rank-\d{5,}\.safetensors")
_FILE: dict[str, type] = {"size": int, "header_sha256": str}
_PIECE: dict[str, type] = {"file": str, "entry": str, "key": str, "shard": dict, "sha256": str}
_SHARD: dict[str, type] = {"global_shape": list, "rank": int, "world": int, "parts": int}


@dataclass(frozen=True)
class Piece:
    """One stored tensor: which part of the whole `key` it is.

    Attributes:
        key: name of the whole tensor.
        shard: tensor-parallel part.
        start, stop: range of the flattened part (ZeRO); None: all of it.
    """

    key: str
    shard: WeightShard
    start: int | None = None
    stop: int | None = None

    def to_json(self, file: str, entry: str) -> dict[str, Any]:
        return {"file": file, "entry": entry, **asdict(self)}


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
        self._index(_read_manifest(folder / MANIFEST))
        if verify:
            self.verify(self.files)

    @classmethod
    def of_files(cls, folder: Path, records: list[dict[str, Any]]) -> CheckpointReader:
        """The files of a checkpoint in the making, by what their writers said of them."""
        reader = cls.__new__(cls)
        reader.folder = folder
        files = {r["file"]: {k: r[k] for k in _FILE} for r in records}
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
        with progress(desc=desc, total=total, unit="B", enabled=speaks()) as bar:
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
            shard = _shard(record["shard"], key)
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
            shard.place(whole, part)
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


def encode_manifest(manifest: dict[str, Any]) -> bytes:
    """The one way to write a manifest: its own digest comes last."""
    body = {"format": FORMAT, **manifest}
    digest = hashlib.sha256(json.dumps(body, indent=1).encode()).hexdigest()
    return json.dumps({**body, "sha256": digest}, indent=1).encode()


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        if path.is_symlink() or os.stat(path).st_size > MAX_MANIFEST_BYTES:
            raise CheckpointError(f"{path}: a link, or longer than {MAX_MANIFEST_BYTES} bytes")
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        manifest = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        raise CheckpointError(f"{path}: format {found!r}, expected {FORMAT}")
    manifest.pop("sha256", None)
    if encode_manifest({k: v for k, v in manifest.items() if k != "format"}) != content:
        raise CheckpointError(f"{path}: damaged: wrong sha256")
    _check_manifest(manifest, path)
    return manifest


def _check_manifest(manifest: dict[str, Any], path: Path) -> None:
    _check_fields(manifest, _MANIFEST, str(path))
    if unknown := sorted(manifest.keys() - _MANIFEST.keys()):
        raise CheckpointError(f"{path}: unknown keys {unknown}")
    for name, entry in manifest["files"].items():
        if not _FILE_NAME.fullmatch(name):
            raise CheckpointError(f"{path}: file {name!r}, expected rank-00000.safetensors")
        _check_fields(entry, _FILE, f"{path}: {name}")
    for piece in manifest["pieces"]:
        _check_fields(piece, _PIECE, f"{path}: a piece")
        _check_fields(piece["shard"], _SHARD, f"{path}: {piece['key']}")
        for bound in ("start", "stop"):
            if not isinstance(piece.get(bound), (int, type(None))):
                raise CheckpointError(f"{path}: {piece['key']}: {bound} {piece[bound]!r}")
        if piece["file"] not in manifest["files"]:
            raise CheckpointError(f"{path}: {piece['key']}: unknown file {piece['file']!r}")


def _check_fields(record: Any, expected: dict[str, type], where: str) -> None:
    if not isinstance(record, dict):
        raise CheckpointError(f"{where}: found {type(record).__name__}, expected an object")
    for key, kind in expected.items():
        if type(record.get(key)) is not kind:
            found = "nothing" if key not in record else type(record[key]).__name__
            raise CheckpointError(f"{where}: {key}: found {found}, expected {kind.__name__}")


def _shard(record: dict[str, Any], key: str) -> WeightShard:
    shape = record["global_shape"]
    dim, world = record.get("dim"), record["world"]
    if (
        any(type(size) is not int or size < 0 for size in shape)
        or not (dim is None or (type(dim) is int and 0 <= dim < len(shape)))
        or not 0 <= record["rank"] < world
        or record["parts"] < 1
    ):
        raise CheckpointError(f"{key}: no part of a tensor: {record}")
    try:
        return WeightShard(tuple(shape), dim, record["rank"], world, record["parts"])
    except ConfigError as error:
        raise CheckpointError(f"{key}: {error}") from None
