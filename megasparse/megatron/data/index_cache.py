"""megatron-core's sample indices, kept and read without pickle, each file under a checksum.

megatron-core keeps its indices as `.npy` and reads them with `allow_pickle=True`: a file put into
the cache folder could run code, and a flipped bit would be trained on. Here it builds them in
memory, and only plain arrays of integers are ever read back.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
from pathlib import Path

import numpy as np
from megatron.core.datasets.gpt_dataset import GPTDataset

from megasparse.atomic_files import replacing, write_json
from megasparse.input_files import open_regular, read_regular

logger = logging.getLogger("megasparse")
# It warns that nothing is cached; that is done here.
logging.getLogger("megatron.core.datasets.gpt_dataset").setLevel(logging.ERROR)

Indices = tuple[np.ndarray, np.ndarray, np.ndarray]
_NAMES = ("document_index", "sample_index", "shuffle_index")


class VerifiedGPTDataset(GPTDataset):
    """GPTDataset whose cached indices are verified; damaged ones are built anew."""

    def _build_document_sample_shuffle_indices(self) -> Indices:
        if not self.config.path_to_cache:
            return super()._build_document_sample_shuffle_indices()
        folder = Path(self.config.path_to_cache)
        stem = f"{self.unique_description_hash}-{self.index_split.name}"
        found = _load(folder, stem)
        if found is not None:
            return found
        # One call of Megatron's into C++: there is nothing to count in between.
        documents, split = len(self.indices), self.index_split.name
        logger.info("building the %s index of %s documents; kept in %s", split, documents, folder)
        cache, self.config.path_to_cache = self.config.path_to_cache, ""  # "": none at all
        try:
            built = super()._build_document_sample_shuffle_indices()
        finally:
            self.config.path_to_cache = cache
        _store(folder, stem, built)
        return built


def _store(folder: Path, stem: str, indices: Indices) -> None:
    """Write the arrays, then the list of their digests, which makes them valid."""
    digests = {}
    for name, array in zip(_NAMES, indices, strict=True):
        path = folder / f"{stem}-{name}.npy"
        with replacing(path) as stream:
            np.save(stream, array, allow_pickle=False)
        digests[path.name] = _digest(path)
    write_json(folder / f"{stem}.json", digests)


def _load(folder: Path, stem: str) -> Indices | None:
    """The cached arrays, mapped; None if there are none, or if they are not as written."""
    listing = folder / f"{stem}.json"
    if not listing.exists():
        return None
    try:
        digests = json.loads(read_regular(listing))
        arrays = []
        for name in _NAMES:
            path = folder / f"{stem}-{name}.npy"
            if not stat.S_ISREG(os.lstat(path).st_mode) or _digest(path) != digests[path.name]:
                raise ValueError(f"{path.name} is not as it was written")
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            if array.dtype.kind not in "iu" or array.ndim not in (1, 2):
                raise ValueError(f"{path.name} holds {array.dtype}, expected integers")
            arrays.append(array)
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s: %s; built anew", listing, error)
        return None
    return arrays[0], arrays[1], arrays[2]


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open_regular(path) as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
