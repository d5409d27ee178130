"""`<prefix>.json`: what a dataset is, beside Megatron's `.bin` and `.idx` that do not say it.

The index format has no checksum and no word about the tokenizer: a flipped bit, an exchanged
`.bin` or another vocabulary trains without an error. The sidecar holds the digests of both files
and of the tokenizer model. Datasets made by Megatron have none; they are read with a warning.

A dataset of conversations has a fourth file, `<prefix>.mask`: a byte for each token, 1 where it
belongs to an answer. The sidecar has its digest, and the chat template that the tokens are of.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path

from megasparse.data.file_errors import read_error
from megasparse.errors import DataError
from megasparse.input_files import open_regular, read_regular

logger = logging.getLogger(__name__)

FORMAT_VERSION = 3
# Fields that version 1 did not have, with what its datasets were made by.
_SINCE_2 = {"bos": None, "add_bos": False, "parse_special": False}
_SINCE_3 = {"chat": None}
VERIFY_MODES = ("auto", "index", "full")
# "auto" hashes the .bin up to this size: about a second of work.
AUTO_VERIFY_BYTES = 1 << 30
_CHUNK_BYTES = 1 << 22
TOKEN_FLAGS = "--eod-token, --bos-token, --add-bos, --parse-special"


def bin_path(prefix: str | os.PathLike) -> Path:
    """Megatron's name of the file with the tokens."""
    return Path(f"{os.fspath(prefix)}.bin")


def idx_path(prefix: str | os.PathLike) -> Path:
    """Megatron's name of the file with lengths, pointers and document boundaries."""
    return Path(f"{os.fspath(prefix)}.idx")


def sidecar_path(prefix: str | os.PathLike) -> Path:
    """Name of the sidecar."""
    return Path(f"{os.fspath(prefix)}.json")


def mask_path(prefix: str | os.PathLike) -> Path:
    """Name of the file that says which tokens have a loss, of a dataset of conversations."""
    return Path(f"{os.fspath(prefix)}.mask")


@dataclasses.dataclass(frozen=True)
class Chat:
    """What is kept of conversations.

    Attributes:
        mask_sha256, mask_size: of the mask.
        num_answer_tokens: tokens that have a loss.
        template: the chat template.
    """

    mask_sha256: str
    mask_size: int
    num_answer_tokens: int
    template: str


@dataclasses.dataclass(frozen=True)
class Sidecar:
    """The sidecar's content; digests are SHA-256 in hex, sizes are in bytes.

    `eod`, `bos`, `add_bos` and `parse_special` are those of `tokenizer.token_rules`; `chat` has the
    fields of `Chat`, None: documents are no conversations.
    """

    bin_sha256: str
    bin_size: int
    idx_sha256: str
    idx_size: int
    dtype: str
    num_documents: int
    num_tokens: int
    tokenizer_type: str
    tokenizer_digest: str
    vocab_size: int
    eod: int
    append_eod: bool
    source: str
    bos: int | None = None
    add_bos: bool = False
    parse_special: bool = False
    chat: dict | None = None
    format_version: int = FORMAT_VERSION

    @property
    def conversations(self) -> Chat | None:
        """`chat`, checked by `read_sidecar`."""
        return None if self.chat is None else Chat(**self.chat)

    def to_json(self) -> bytes:
        """The file's bytes."""
        text = json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False)
        return text.encode("utf-8") + b"\n"


def read_sidecar(prefix: str | os.PathLike) -> Sidecar | None:
    """The sidecar of a dataset, or None when the dataset has none.

    Raises:
        DataError: it cannot be read, or is not what `Sidecar.to_json` writes.
    """
    path = sidecar_path(prefix)
    try:
        raw = read_regular(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise read_error(path, error) from error
    try:
        values = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: found no JSON, expected a dataset's sidecar ({error})") from None
    if not isinstance(values, dict):
        raise DataError(f"{path}: found a JSON {type(values).__name__}, expected an object")
    version = values.get("format_version")
    if version in (1, 2):
        older = _SINCE_2 if version == 1 else {}
        values = {**older, **_SINCE_3, **values, "format_version": FORMAT_VERSION}
    elif version != FORMAT_VERSION:
        raise DataError(f"{path}: format_version: found {version!r}, expected {FORMAT_VERSION}")
    _check_fields(values, Sidecar, path)
    if values["chat"] is not None:
        _check_fields(values["chat"], Chat, path)
    return Sidecar(**values)


def _check_fields(values: dict, kind: type[Sidecar] | type[Chat], path: Path) -> None:
    fields = {field.name: str(field.type) for field in dataclasses.fields(kind)}
    if values.keys() != fields.keys():
        difference = sorted(values.keys() ^ fields.keys())
        raise DataError(f"{path}: missing or unknown fields: {', '.join(map(repr, difference))}")
    for name, expected in fields.items():
        found = values[name]
        if type(found).__name__.replace("NoneType", "None") not in expected.split(" | "):
            raise DataError(f"{path}: {name}: found {found!r}, expected a value of type {expected}")


def check_sidecar(
    prefix: str | os.PathLike,
    tokenizer_digest: str | None = None,
    *,
    rules: Mapping[str, int | bool | None] | None = None,
    verify: str = "auto",
) -> Sidecar | None:
    """Compare a dataset's files with its sidecar; returns it, or None (with a warning) if missing.

    Args:
        prefix: path of the dataset without `.bin`.
        tokenizer_digest: of the tokenizer that the run uses; None to leave that out.
        rules: its `token_rules`, likewise.
        verify: sizes and the digest of the `.idx` are always compared; "full" also hashes the
            `.bin`, "auto" does so below 1 GiB, "index" never.

    Raises:
        DataError: a file or the tokenizer is not the one that the dataset was made with.
    """
    if verify not in VERIFY_MODES:
        raise DataError(f"verify: found {verify!r}, expected one of {', '.join(VERIFY_MODES)}")
    sidecar = read_sidecar(prefix)
    if sidecar is None:
        logger.warning(
            "%s: no such file; the dataset's checksums and tokenizer are not checked",
            sidecar_path(prefix),
        )
        return None
    hash_bin = verify == "full" or (verify == "auto" and sidecar.bin_size < AUTO_VERIFY_BYTES)
    _check_file(idx_path(prefix), sidecar.idx_size, sidecar.idx_sha256)
    _check_file(bin_path(prefix), sidecar.bin_size, sidecar.bin_sha256 if hash_bin else None)
    if (chat := sidecar.conversations) is not None:
        _check_file(mask_path(prefix), chat.mask_size, chat.mask_sha256 if hash_bin else None)
    if tokenizer_digest is not None and tokenizer_digest != sidecar.tokenizer_digest:
        raise DataError(
            f"{os.fspath(prefix)}: made with the tokenizer of sha256 {sidecar.tokenizer_digest} "
            f"({sidecar.tokenizer_type}), but the run's tokenizer has sha256 {tokenizer_digest}"
        )
    for name, value in (rules or {}).items():
        made_with = getattr(sidecar, name)
        # Which token would begin a document matters only where one does.
        if made_with != value and (name != "bos" or sidecar.add_bos):
            raise DataError(
                f"{os.fspath(prefix)}: made with {name} {made_with}, but the run's tokenizer has "
                f"{name} {value} ({TOKEN_FLAGS})"
            )
    return sidecar


def _check_file(path: Path, size: int, sha256: str | None) -> None:
    digest = hashlib.sha256()
    try:
        with open_regular(path) as stream:
            found = os.fstat(stream.fileno()).st_size
            if found != size:
                raise DataError(f"{path}: found {found} bytes, expected {size} (its sidecar)")
            while sha256 is not None and (chunk := stream.read(_CHUNK_BYTES)):
                digest.update(chunk)
    except OSError as error:
        raise read_error(path, error) from error
    if sha256 is not None and digest.hexdigest() != sha256:
        raise DataError(
            f"{path}: found sha256 {digest.hexdigest()}, expected {sha256} (its sidecar): the "
            "file is damaged or was exchanged"
        )
