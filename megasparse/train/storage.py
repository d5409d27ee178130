"""Checkpoint files: safetensors and JSON, complete or absent, verified on load.

A checkpoint is a folder `step-00000100` with one safetensors file a rank and `manifest.json`. The
manifest is written last, into a temporary folder that one rename publishes; it holds the size and
SHA-256 of every file and, for every tensor, which piece of the whole it is. So a reader can take
any tensor whole, whatever the layout that wrote it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megasparse.errors import CheckpointError
from megasparse.sparsity.shard import WeightShard

FORMAT = 1
MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{8})")


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


def step_folder(root: Path, step: int) -> Path:
    """Folder of the checkpoint after `step` optimizer steps."""
    return root / f"step-{step:08d}"


def list_steps(root: Path) -> list[int]:
    """Steps of the published checkpoints, newest first."""
    if not root.is_dir():
        return []
    matches = (_NAME.fullmatch(entry.name) for entry in root.iterdir() if entry.is_dir())
    return sorted((int(match[1]) for match in matches if match), reverse=True)


def write_rank_file(
    folder: Path, rank: int, tensors: dict[str, tuple[Piece, torch.Tensor]]
) -> dict[str, Any]:
    """Write one rank's tensors durably.

    Args:
        folder: the temporary folder.
        tensors: piece and value by entry name.

    Returns:
        What the manifest says of the file.
    """
    name = f"rank-{rank:05d}.safetensors"
    path = folder / name
    # Cloned, since safetensors refuses tensors that share memory: pieces of one flat shard do.
    values = {entry: value.detach().cpu().clone() for entry, (_, value) in tensors.items()}
    save_file(values, path)
    with open(path, "rb") as stream:
        os.fsync(stream.fileno())
    return {
        "file": name,
        "size": path.stat().st_size,
        "sha256": file_digest(path),
        "pieces": [piece.to_json(name, entry) for entry, (piece, _) in tensors.items()],
    }


def publish(
    temporary: Path, final: Path, files: list[dict[str, Any]], meta: dict[str, Any]
) -> None:
    """Write the manifest and give the checkpoint its name (rank 0, after all files are written)."""
    manifest = {
        "format": FORMAT,
        **meta,
        "files": {f["file"]: {"size": f["size"], "sha256": f["sha256"]} for f in files},
        "pieces": [piece for f in files for piece in f["pieces"]],
    }
    body = json.dumps(manifest, indent=1).encode()
    manifest["sha256"] = hashlib.sha256(body).hexdigest()
    path = temporary / MANIFEST
    with open(path, "wb") as stream:
        stream.write(json.dumps(manifest, indent=1).encode())
        stream.flush()
        os.fsync(stream.fileno())
    _sync_folder(temporary)
    if final.exists():
        shutil.rmtree(final)
    os.rename(temporary, final)
    _sync_folder(final.parent)


class CheckpointReader:
    """A verified checkpoint: whole tensors by key.

    Args:
        folder: of one checkpoint.
        verify: compare the digest of every file (one pass over the bytes).

    Raises:
        CheckpointError: names the damaged file.
    """

    def __init__(self, folder: Path, verify: bool = True) -> None:
        self.folder = folder
        self.meta = _read_manifest(folder / MANIFEST)
        self._pieces: dict[str, list[dict[str, Any]]] = {}
        for piece in self.meta["pieces"]:
            self._pieces.setdefault(piece["key"], []).append(piece)
        for name, expected in self.meta["files"].items():
            path = folder / name
            if Path(name).name != name or not path.is_file():
                raise CheckpointError(f"{path}: missing, expected {expected['size']} bytes")
            if (size := path.stat().st_size) != expected["size"]:
                raise CheckpointError(f"{path}: found {size} bytes, expected {expected['size']}")
            if verify and (digest := file_digest(path)) != expected["sha256"]:
                raise CheckpointError(
                    f"{path}: damaged: sha256 {digest}, expected {expected['sha256']}"
                )

    def keys(self, prefix: str = "") -> list[str]:
        """Keys of the stored tensors that start with `prefix`."""
        return [key for key in self._pieces if key.startswith(prefix)]

    def __contains__(self, key: str) -> bool:
        return key in self._pieces

    def read(self, key: str) -> torch.Tensor:
        """The whole tensor, put together from its pieces, on the CPU.

        Raises:
            CheckpointError: no such tensor, or the pieces do not make it up.
        """
        if key not in self._pieces:
            raise CheckpointError(f"{self.folder}: holds no tensor {key!r}")
        whole: torch.Tensor | None = None
        covered = 0
        parts: dict[WeightShard, torch.Tensor] = {}
        for record in self._pieces[key]:
            shard = _shard(record["shard"])
            value = self._load(record)
            if record["start"] is None:
                parts[shard] = value.reshape(shard.local_shape)
                covered += value.numel()
                continue
            part = parts.setdefault(shard, torch.empty(shard.local_shape, dtype=value.dtype))
            part.view(-1)[record["start"] : record["stop"]] = value
            covered += value.numel()
        for shard, part in parts.items():
            if whole is None:
                whole = torch.empty(shard.global_shape, dtype=part.dtype)
            shard.place(whole, part)
        assert whole is not None
        if covered != whole.numel():
            raise CheckpointError(
                f"{self.folder}: {key}: its pieces hold {covered} of {whole.numel()} values"
            )
        return whole

    def _load(self, record: dict[str, Any]) -> torch.Tensor:
        path = self.folder / record["file"]
        try:
            with safe_open(path, framework="pt") as stream:
                return stream.get_tensor(record["entry"])
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: {record['entry']}: {error}") from None


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        raise CheckpointError(f"{path}: format {found!r}, expected {FORMAT}")
    expected = manifest.pop("sha256", None)
    digest = hashlib.sha256(json.dumps(manifest, indent=1).encode()).hexdigest()
    if digest != expected:
        raise CheckpointError(f"{path}: damaged: sha256 {digest}, expected {expected}")
    return manifest


def _shard(record: dict[str, Any]) -> WeightShard:
    return WeightShard(
        tuple(record["global_shape"]),
        record["dim"],
        record["rank"],
        record["world"],
        record["parts"],
    )


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
