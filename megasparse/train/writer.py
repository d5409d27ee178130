"""Writing a checkpoint: one streamed safetensors file a rank, then the manifest, then one rename.

Tensors go to the file one by one, hashed on the way, so a save needs host memory for one tensor,
not for the rank's share. Each is read back from the disk before the checkpoint gets its name.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megasparse.errors import StorageError
from megasparse.train.catalog import sync_folder
from megasparse.train.storage import DTYPES, MANIFEST, Piece, encode_manifest, raw_bytes

Tensors = dict[str, tuple[Piece, torch.Tensor]]
Hook = Callable[[str], None]


def ignore(_: str) -> None:
    """The hook of a save that nobody follows."""


def byte_size(tensors: Tensors) -> int:
    """Bytes of the tensors' values."""
    return sum(value.numel() * value.element_size() for _, value in tensors.values())


def write_rank_file(
    folder: Path, rank: int, tensors: Tensors, binding: dict[str, Any], hook: Hook = ignore
) -> dict[str, Any]:
    """Write one rank's tensors durably.

    Args:
        folder: the temporary folder.
        tensors: piece and value by entry name.
        binding: run and step, written into the file, so that no other file can take its place.
        hook: called with the name of every point that is passed.

    Returns:
        What the manifest says of the file.

    Raises:
        OSError: cannot be written.
    """
    name = f"rank-{rank:05d}.safetensors"
    # Wide types first: an entry must start at a multiple of its own size.
    ordered = sorted(tensors, key=lambda entry: -tensors[entry][1].element_size())
    header = _header(ordered, tensors, {**binding, "rank": rank})
    pieces = []
    with open(folder / name, "wb") as stream:
        stream.write(header)
        for entry in ordered:
            piece, value = tensors[entry]
            content = raw_bytes(value)
            stream.write(content)
            digest = hashlib.sha256(content).hexdigest()
            pieces.append({**piece.to_json(name, entry), "sha256": digest})
            hook("save:file")
        stream.flush()
        hook("save:sync")
        os.fsync(stream.fileno())
        size = stream.tell()
        # What is read back shall come from the disk.
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    header_digest = hashlib.sha256(header).hexdigest()
    return {"file": name, "size": size, "header_sha256": header_digest, "pieces": pieces}


def _header(ordered: list[str], tensors: Tensors, binding: dict[str, Any]) -> bytes:
    """safetensors: u64 length, then JSON padded with spaces to a multiple of 8."""
    entries: dict[str, Any] = {"__metadata__": {key: str(v) for key, v in binding.items()}}
    offset = 0
    for entry in ordered:
        value = tensors[entry][1]
        stop = offset + value.numel() * value.element_size()
        entries[entry] = {
            "dtype": DTYPES[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [offset, stop],
        }
        offset = stop
    body = json.dumps(entries, separators=(",", ":")).encode()
    body += b" " * (-len(body) % 8)
    return len(body).to_bytes(8, "little") + body


def publish(
    temporary: Path,
    final: Path,
    files: list[dict[str, Any]],
    meta: dict[str, Any],
    hook: Hook = ignore,
) -> None:
    """Write the manifest and give the checkpoint its name (one rank, after all files are written).

    A checkpoint of the same step is set aside until the new one has its name.
    """
    manifest = {
        **meta,
        "files": {f["file"]: {k: f[k] for k in ("size", "header_sha256")} for f in files},
        "pieces": [piece for f in files for piece in f["pieces"]],
    }
    hook("save:manifest")
    with open(temporary / MANIFEST, "wb") as stream:
        stream.write(encode_manifest(manifest))
        stream.flush()
        os.fsync(stream.fileno())
    sync_folder(temporary)
    hook("save:rename")
    replaced: Path | None = None
    if final.exists():
        replaced = final.with_name(f"{final.name}.old-{secrets.token_hex(4)}")
        os.rename(final, replaced)
    os.rename(temporary, final)
    sync_folder(final.parent)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)


def check_free_space(root: Path, needed: int) -> None:
    """Refuse to begin a save for which the disk has no room.

    Raises:
        StorageError: tells need and room in bytes.
    """
    needed += needed // 50 + (1 << 16)  # headers, manifest, blocks
    free = shutil.disk_usage(root).free
    if free < needed:
        raise StorageError(f"{root}: no room for a checkpoint: {free} bytes free, {needed} needed")
