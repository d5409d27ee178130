"""What a dataset's tokens are, by digests: of all bytes, and of samples spread over them.

A sample takes 16 MiB of reading however large the file is, so every start can afford it. It finds
another file, an order that changed, and any damage that is longer than the gap between two blocks:
a four-thousandth of the file. Only the digest of all bytes finds every change.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from megasparse.input_files import open_regular

BLOCKS = 4096
BLOCK_BYTES = 4096
_CHUNK_BYTES = 1 << 22


def whole_digest(path: Path) -> str:
    """SHA-256 of a file, in hex.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with open_regular(path) as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def sampled_digest(path: Path) -> str:
    """SHA-256 of a file's size and of blocks at equal distances, its first and last among them.

    Raises:
        OSError: it cannot be read.
    """
    with open_regular(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        digest = hashlib.sha256(f"{size} {BLOCKS} {BLOCK_BYTES} ".encode())
        if size <= BLOCKS * BLOCK_BYTES:
            digest.update(stream.read())
        else:
            for number in range(BLOCKS):
                offset = (size - BLOCK_BYTES) * number // (BLOCKS - 1)
                digest.update(os.pread(stream.fileno(), BLOCK_BYTES, offset))
    return digest.hexdigest()
