"""The manifest of a checkpoint: what it says, how it is written, and the check of every field.

It says of each rank's file no more than size and digest of the header, about 150 bytes. The list
of the pieces that a file holds is in its own header (`rank_file.py`), so a manifest stays small
however many ranks and parameters there are.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from megasparse.errors import CheckpointError, StorageError
from megasparse.input_files import read_regular, shown

FORMAT = 3
OLD_FORMAT = 2  # lists the pieces of all files; still read
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 1 << 30

# What a manifest says, no more and no less.
_MANIFEST: dict[str, type] = {
    "format": int, "run_id": str, "step": int, "consumed_samples": int, "layout": dict,
    "optimizer_steps": int, "digests": dict, "config": dict, "state": dict, "versions": dict,
    "files": dict,
}  # fmt: skip
_FILE_NAME = re.compile(r"rank-\d{5,}\.safetensors")
FILE_FIELDS: dict[str, type] = {"size": int, "header_sha256": str}
# The end of a manifest: the digest of all before it.
_ENDS = {FORMAT: (b',"sha256":"%s"}', b"}"), OLD_FORMAT: (b',\n "sha256": "%s"\n}', b"\n}")}


def newer_format(version: int) -> str:
    """The words for a manifest that a newer version wrote: it is not damaged."""
    return f"format {version}, expected {FORMAT}; a newer version of megasparse wrote it"


def file_name(rank: int) -> str:
    """Of a rank's file."""
    return f"rank-{rank:05d}.safetensors"


def encode_manifest(manifest: dict[str, Any]) -> bytes:
    """The one way to write a manifest: its own digest comes last.

    Raises:
        StorageError: longer than readers take.
    """
    body = json.dumps({"format": FORMAT, **manifest}, separators=(",", ":")).encode()
    digest = hashlib.sha256(body).hexdigest().encode()
    content = body[:-1] + _ENDS[FORMAT][0] % digest
    if len(content) > MAX_MANIFEST_BYTES:
        raise StorageError(
            f"the manifest would have {len(content)} bytes, readers take {MAX_MANIFEST_BYTES}"
        )
    return content


def read_manifest(path: Path) -> bytes:
    """The content of a manifest, not checked.

    Raises:
        CheckpointError: cannot be read.
    """
    try:
        if path.is_symlink() or os.stat(path).st_size > MAX_MANIFEST_BYTES:
            raise CheckpointError(f"{path}: a link, or longer than {MAX_MANIFEST_BYTES} bytes")
        return read_regular(path, MAX_MANIFEST_BYTES)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None


def decode_manifest(content: bytes, path: Path) -> dict[str, Any]:
    """What a manifest says: its digest is of the bytes as they are, every field is checked.

    Args:
        path: where it was read, for messages.

    Raises:
        CheckpointError: names what was found and expected.
    """
    try:
        manifest = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged: {error}") from None
    version = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
    if type(version) is int and version > FORMAT:
        raise CheckpointError(f"{path}: {newer_format(version)}")
    if type(version) is not int or version not in _ENDS:
        raise CheckpointError(f"{path}: format {shown(version)}, expected {FORMAT}")
    end, closing = _ENDS[version]
    body = content[: -len(end % (b"0" * 64))] + closing
    if content != body[: -len(closing)] + end % hashlib.sha256(body).hexdigest().encode():
        raise CheckpointError(f"{path}: damaged: wrong sha256")
    del manifest["sha256"]
    _check_manifest(manifest, path)
    return manifest


def _check_manifest(manifest: dict[str, Any], path: Path) -> None:
    fields = _MANIFEST if manifest["format"] == FORMAT else {**_MANIFEST, "pieces": list}
    check_fields(manifest, fields, str(path))
    if unknown := sorted(manifest.keys() - fields.keys()):
        raise CheckpointError(f"{path}: unknown keys {shown(unknown)}")
    for name, entry in manifest["files"].items():
        if not _FILE_NAME.fullmatch(name):
            raise CheckpointError(f"{path}: file {shown(name)}, expected rank-00000.safetensors")
        check_fields(entry, FILE_FIELDS, f"{path}: {name}")
    for piece in manifest.get("pieces", ()):
        check_fields(piece, {"file": str}, f"{path}: a piece")
        if piece["file"] not in manifest["files"]:
            raise CheckpointError(f"{path}: unknown file {shown(piece['file'])}")


def check_fields(record: Any, expected: dict[str, type], where: str) -> None:
    """Refuse a record without these fields, or with others' types in them.

    Raises:
        CheckpointError: names field, found and expected type.
    """
    if not isinstance(record, dict):
        raise CheckpointError(f"{where}: found {type(record).__name__}, expected an object")
    for key, kind in expected.items():
        if type(record.get(key)) is not kind:
            found = "nothing" if key not in record else type(record[key]).__name__
            raise CheckpointError(f"{where}: {key}: found {found}, expected {kind.__name__}")
