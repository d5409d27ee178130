"""A small real corpus that is on every machine: the Python standard library's own sources.

Each source file is one JSONL document `{"text": ...}`: half code, half English prose in
docstrings and comments, enough to see a small model learn without any download.
"""

from __future__ import annotations

import hashlib
import json
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megasparse.atomic_files import replacing
from megasparse.errors import DataError

DEFAULT_MAX_BYTES = 4_000_000

# `encodings` is tables of code points: neither code nor prose. Tests repeat themselves.
EXCLUDED_DIRECTORIES = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings"}
)


@dataclass(frozen=True)
class CorpusSummary:
    """What `write_corpus` wrote: documents, and the UTF-8 bytes of their texts."""

    num_documents: int
    num_bytes: int


def source_files(root: Path) -> list[Path]:
    """The `.py` files below `root`, in an order that depends on their relative names only.

    The order is that of the names' SHA-256, not the alphabet: a dataset is split into train,
    validation and test by ranges of documents, and neighbours in the alphabet are packages.
    """
    relative = (path.relative_to(root) for path in root.rglob("*.py"))
    kept = [path for path in relative if not EXCLUDED_DIRECTORIES.intersection(path.parts)]
    kept.sort(key=lambda path: hashlib.sha256(path.as_posix().encode()).digest())
    return [root / path for path in kept]


def documents(root: Path, max_bytes: int) -> Iterator[str]:
    """Texts of the source files below `root`, at most `max_bytes` of UTF-8 in all.

    Documents are never cut: one that does not fit any more is left out and smaller ones are
    tried. Files that are empty or not UTF-8 are left out.
    """
    left = max_bytes
    for path in source_files(root):
        content = path.read_bytes()
        if not content or len(content) > left:
            continue
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:
            continue
        left -= len(content)
        yield text


def write_corpus(
    output: Path, max_bytes: int = DEFAULT_MAX_BYTES, root: Path | None = None
) -> CorpusSummary:
    """Write the corpus to `output`, one JSON object with the key `text` a line.

    Args:
        output: the JSONL file; it appears only when it is whole.
        max_bytes: upper bound of the texts' UTF-8 bytes (the JSON is a little larger).
        root: where the sources are, the running Python's standard library unless given.

    Raises:
        DataError: `max_bytes` is not positive, no source was found, or `output` cannot be written.
    """
    if max_bytes <= 0:
        raise DataError(f"max_bytes: found {max_bytes}, expected a positive number of bytes")
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    num_documents = num_bytes = 0
    with replacing(output, DataError) as stream:
        for text in documents(root, max_bytes):
            stream.write(json.dumps({"text": text}, ensure_ascii=False).encode("utf-8") + b"\n")
            num_documents += 1
            num_bytes += len(text.encode("utf-8"))
        if num_documents == 0:
            raise DataError(f"{root}: found no Python source of at most {max_bytes} bytes")
    return CorpusSummary(num_documents, num_bytes)
