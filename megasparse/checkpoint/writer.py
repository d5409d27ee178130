"""Writing a checkpoint: one streamed safetensors file a rank, then the manifest, then one rename.

Tensors go to the file one by one, hashed on the way, so a save needs host memory for one tensor,
not for the rank's share. Each is read back from the disk before the checkpoint gets its name.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megasparse.atomic_files import rename, sync, sync_folder, synced
from megasparse.checkpoint.manifest import MANIFEST, Piece, encode_manifest
from megasparse.tensor_files import Entry, write_tensors

Tensors = dict[str, tuple[Piece, torch.Tensor]]
Hook = Callable[[str], None]


def ignore(_: str) -> None:
    """The hook of a save that nobody follows."""


def byte_size(tensors: Tensors) -> int:
    """Bytes of the tensors' values."""
    return sum(value.numel() * value.element_size() for _, value in tensors.values())


def write_rank_file(
    folder: Path,
    rank: int,
    tensors: Tensors,
    binding: dict[str, Any],
    hook: Hook = ignore,
    read: Callable[[str], torch.Tensor] | None = None,
) -> dict[str, Any]:
    """Write one rank's tensors durably.

    Args:
        folder: the temporary folder.
        tensors: piece and value by entry name.
        binding: run and step, written into the file, so that no other file can take its place.
        hook: called with the name of every point that is passed.
        read: gives the values, if those in `tensors` have only dtype and shape (meta device).

    Returns:
        What the manifest says of the file.

    Raises:
        OSError: cannot be written.
    """
    name = f"rank-{rank:05d}.safetensors"
    with open(folder / name, "wb") as stream:
        header_digest, digests = write_tensors(
            stream,
            [Entry.of(entry, value) for entry, (_, value) in tensors.items()],
            read or (lambda entry: tensors[entry][1]),
            {**binding, "rank": rank},
            lambda: hook("save:file"),
        )
        stream.flush()
        hook("save:sync")
        sync(stream)
        size = stream.tell()
        # What is read back shall come from the disk.
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    pieces = [
        {**tensors[entry][0].to_json(name, entry), "sha256": digest}
        for entry, digest in digests.items()
    ]
    return {"file": name, "size": size, "header_sha256": header_digest, "pieces": pieces}


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
    with synced(temporary / MANIFEST) as stream:
        stream.write(encode_manifest(manifest))
    sync_folder(temporary)
    hook("save:rename")
    replaced: Path | None = None
    if final.exists():
        replaced = final.with_name(f"{final.name}.old-{secrets.token_hex(4)}")
        os.rename(final, replaced)
    rename(temporary, final)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)
