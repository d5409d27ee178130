"""Writing a checkpoint: one streamed safetensors file a rank, then the manifest, then one rename.

Tensors go to the file one by one, hashed on the way, so a save needs host memory for one tensor,
not for the rank's share. Each is read back from the disk before the checkpoint gets its name.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megasparse.atomic_files import rename, sync, sync_folder, synced
from megasparse.checkpoint.directory import set_aside
from megasparse.checkpoint.identity import entry_at
from megasparse.checkpoint.manifest import MANIFEST, decode_manifest, encode_manifest, file_name
from megasparse.checkpoint.pieces import Piece
from megasparse.checkpoint.rank_file import describe
from megasparse.log import is_logging_rank, logger
from megasparse.progress import progress
from megasparse.tensor_files import Entry, write_tensors

Tensors = dict[str, tuple[Piece, torch.Tensor]]
Hook = Callable[[str], None]


def ignore(_: str) -> None:
    """The hook of a save that nobody follows."""


def byte_size(tensors: Tensors) -> int:
    """Bytes of the tensors' values."""
    return sum(value.numel() * value.element_size() for _, value in tensors.values())


@contextmanager
def bytes_shown(
    step: int, tensors: Tensors, foreground: bool
) -> Iterator[Callable[[str], torch.Tensor]]:
    """The values of a save by entry name, under a bar that counts their bytes.

    Args:
        foreground: whether the run waits for the save; no bar otherwise.
    """
    with progress(
        desc=f"saving step {step}",
        total=byte_size(tensors),
        unit="B",
        enabled=is_logging_rank() and foreground,
        leave=False,
    ) as bar:

        def read(entry: str) -> torch.Tensor:
            value = tensors[entry][1]
            bar.update(value.nbytes)
            return value

        yield read


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
        What the manifest says of the file, by the file's name.

    Raises:
        OSError: cannot be written. SafetensorError: more pieces than readers take.
    """
    name = file_name(rank)
    with open(folder / name, "wb") as stream:
        header_digest, _ = write_tensors(
            stream,
            [Entry.of(entry, value) for entry, (_, value) in tensors.items()],
            read or (lambda entry: tensors[entry][1]),
            {**binding, "rank": rank},
            lambda: hook("save:file"),
            describe({entry: piece for entry, (piece, _) in tensors.items()}),
        )
        stream.flush()
        hook("save:sync")
        sync(stream)
        size = stream.tell()
        # What is read back shall come from the disk.
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return {name: {"size": size, "header_sha256": header_digest}}


def publish(
    temporary: Path,
    final: Path,
    files: dict[str, dict[str, Any]],
    meta: dict[str, Any],
    hook: Hook = ignore,
) -> None:
    """Write the manifest and give the checkpoint its name (one rank, after all files are written).

    Every writer has read its own file back; what the manifest says is checked here as a reader
    does, before anything is published. A checkpoint of the same step is set aside until the new one
    has its name; another one that was given this name by hand is kept under a further one.

    Raises:
        OSError: cannot be written. CheckpointError: readers would refuse it.
    """
    hook("save:manifest")
    content = encode_manifest({**meta, "files": files})
    decode_manifest(content, temporary / MANIFEST)
    with synced(temporary / MANIFEST) as stream:
        stream.write(content)
    sync_folder(temporary)
    hook("save:rename")
    replaced: Path | None = None
    there = entry_at(final)
    if there is not None and there.format is not None and not there.is_own:
        kept = set_aside(final, "kept")
        logger.warning("%s: held another checkpoint than its name says, kept as %s", final, kept)
    elif final.exists():
        replaced = final.with_name(f"{final.name}.old-{secrets.token_hex(4)}")
        os.rename(final, replaced)
    rename(temporary, final)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)
