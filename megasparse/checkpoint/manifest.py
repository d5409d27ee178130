"""The manifest of a checkpoint: what it says, how it is written, and the check of every field."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megasparse.errors import CheckpointError, ConfigError
from megasparse.sparsity.shard import WeightShard

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
FILE_FIELDS: dict[str, type] = {"size": int, "header_sha256": str}
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


def encode_manifest(manifest: dict[str, Any]) -> bytes:
    """The one way to write a manifest: its own digest comes last."""
    body = {"format": FORMAT, **manifest}
    digest = hashlib.sha256(json.dumps(body, indent=1).encode()).hexdigest()
    return json.dumps({**body, "sha256": digest}, indent=1).encode()


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest at `path`, every field checked, and its own digest.

    Raises:
        CheckpointError: names what was found and expected.
    """
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
        _check_fields(entry, FILE_FIELDS, f"{path}: {name}")
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


def shard_of(record: dict[str, Any], key: str) -> WeightShard:
    """The shard that a piece of the tensor `key` is.

    Raises:
        CheckpointError: the record describes no shard.
    """
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
