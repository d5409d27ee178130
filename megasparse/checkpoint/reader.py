"""Checkpoint files: safetensors and JSON, every byte under a checksum, verified before use.

A checkpoint is a folder `step-00000100` with one safetensors file a rank and `manifest.json`. The
manifest has size and header digest of every file; the header says, for every tensor of the file,
its SHA-256 and which piece of the whole it is. So a reader can take any part of any tensor,
whatever the layout that wrote it, and damage is found by the name of tensor and file.

Headers are read when they are needed. A rank of a resumed run names the files that its state is
most likely in (`search_first`), and opens no others if it finds all there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megasparse.checkpoint.manifest import MANIFEST, decode_manifest, read_manifest
from megasparse.checkpoint.pieces import Piece, Stored, owners, require_cover
from megasparse.checkpoint.rank_file import RankFile
from megasparse.errors import CheckpointError
from megasparse.log import is_logging_rank
from megasparse.progress import progress
from megasparse.sparsity.shard import WeightShard

_OPEN_FILES = 16  # at a time; a checkpoint may have more than a process can open


class CheckpointReader:
    """A checkpoint: tensors by key, whole or in part.

    Args:
        folder: of one checkpoint.
        verify: compare the digest of every tensor now (one pass over the bytes). `read_part`
            does so for the pieces that it reads whole in any case.
        manifest: content of the manifest, if it was read before (by rank 0, for all).

    Raises:
        CheckpointError: names the damaged file and tensor.
    """

    def __init__(self, folder: Path, verify: bool = True, manifest: bytes | None = None) -> None:
        if folder.is_symlink():
            raise CheckpointError(f"{folder}: found a link, expected a folder")
        path = folder / MANIFEST
        content = manifest if manifest is not None else read_manifest(path)
        self._begin(folder, decode_manifest(content, path))
        if verify:
            self.verify(self.files)

    @classmethod
    def of_files(cls, folder: Path, files: dict[str, dict[str, Any]]) -> CheckpointReader:
        """The files of a checkpoint in the making, by what their writers said of them."""
        reader = cls.__new__(cls)
        reader._begin(folder, {"files": files})
        return reader

    def _begin(self, folder: Path, meta: dict[str, Any]) -> None:
        self.folder, self.meta = folder, meta
        self.verified: list[str] = []  # files whose every byte this process has compared
        self._known: dict[str, RankFile] = {}
        self._open: list[RankFile] = []
        self._pieces: dict[str, list[tuple[RankFile, Stored]]] = {}
        self._to_search: list[list[str]] = [list(meta["files"])]
        self._indexed: set[str] = set()
        self._records: dict[str, list[Any]] | None = None
        if "pieces" in meta:  # the old format
            self._records = {name: [] for name in meta["files"]}
            for record in meta["pieces"]:
                self._records[record["file"]].append(record)

    @property
    def imported(self) -> bool:
        """Whether these are weights from elsewhere, without any run's state."""
        return "imported" in self.meta["state"]

    @property
    def files(self) -> list[str]:
        """Names of the files with tensors."""
        return list(self.meta["files"])

    def share(self, rank: int, world: int) -> list[str]:
        """The files that fall to a rank: about the bytes that `SharedReader` lets it read, too."""
        if len(self.files) == world:
            return [self.files[rank]]
        owner = owners([self.meta["files"][name]["size"] for name in self.files], world)
        return [name for name, one in zip(self.files, owner, strict=True) if one == rank]

    def verify(self, files: Sequence[str]) -> None:
        """Compare the digests of all tensors in these files.

        Raises:
            CheckpointError: names file and tensor.
        """
        total = sum(self.meta["files"][name]["size"] for name in files)
        desc = f"verifying {self.folder.name.partition('.')[0]}"
        with progress(
            desc=desc, total=total, unit="B", enabled=is_logging_rank(), leave=False
        ) as bar:
            for name in files:
                self.file(name).verify(bar.update)
                self.verified.append(name)

    def search_first(self, groups: Sequence[Sequence[str]]) -> None:
        """Say where tensors probably are.

        Args:
            groups: of files, those of the first group first; all others come after the last.
        """
        known = self.meta["files"].keys()
        self._to_search = [[name for name in group if name in known] for group in groups]
        self._to_search.append(self.files)

    def keys(self, prefix: str = "") -> list[str]:
        """Keys of the stored tensors that start with `prefix`."""
        self._search_all()
        return [key for key in self._pieces if key.startswith(prefix)]

    def keys_beside(self, key: str, prefix: str) -> list[str]:
        """Keys that start with `prefix`, from the files searched until `key` was found."""
        self._find(key)
        return [other for other in self._pieces if other.startswith(prefix)]

    def __contains__(self, key: str) -> bool:
        return self._find(key)

    def is_likely(self, key: str) -> bool:
        """Whether the files that `search_first` was told hold a tensor; no others are opened."""
        while len(self._to_search) > 1:
            self._search_more()
        return key in self._pieces

    def dtype(self, key: str) -> torch.dtype:
        """Of a stored tensor.

        Raises:
            CheckpointError: no such tensor, or damaged.
        """
        file, stored = self._require(key)[0]
        return file.dtype(stored)

    def shape(self, key: str) -> tuple[int, ...]:
        """Of the whole tensor.

        Raises:
            CheckpointError: no such tensor.
        """
        return self._require(key)[0][1].piece.shard.global_shape

    def read(self, key: str) -> torch.Tensor:
        """The whole tensor, put together from its pieces, on the CPU.

        Raises:
            CheckpointError: no such tensor, damaged, or the pieces do not make it up.
        """
        return self.read_part(Piece(key, WeightShard(self.shape(key)))).view(self.shape(key))

    def read_part(self, wanted: Piece) -> torch.Tensor:
        """A part of a tensor, 1-D, on the CPU; only its own bytes are read.

        Raises:
            CheckpointError: no such tensor, damaged, of another shape, or the pieces do not make
                the part up.
        """
        key, target = wanted.key, None
        found: list[tuple[int, int]] = []
        read: set[tuple[str, str]] = set()
        while True:
            for file, stored in self._require(key):
                if (file.path.name, stored.entry) in read:
                    continue
                read.add((file.path.name, stored.entry))
                if stored.piece.shard.global_shape != wanted.shard.global_shape:
                    raise CheckpointError(
                        f"{file.path}: {key} is of a tensor of shape "
                        f"{stored.piece.shard.global_shape}, expected {wanted.shard.global_shape}"
                    )
                if target is None:
                    target = self._room(key, wanted, file.dtype(stored))
                if file.dtype(stored) != target.dtype:
                    raise CheckpointError(f"{self.folder}: {key}: its pieces disagree on the type")
                self._touch(file)
                runs = file.read_common(stored, wanted, target)
                found += [(run.wanted, run.length) for run in runs]
            have = sum(length for _, length in found)
            if have >= wanted.numel or not self._search_more():
                break
        require_cover(found, wanted, str(self.folder))
        assert target is not None
        return target

    def close(self) -> None:
        """Close all files; they are opened again when they are read."""
        for file in self._open:
            file.close()
        self._open.clear()

    def _room(self, key: str, wanted: Piece, dtype: torch.dtype) -> torch.Tensor:
        """Memory for the part, once it is known that the files can hold as much."""
        if wanted.numel > sum(entry["size"] for entry in self.meta["files"].values()):
            raise CheckpointError(
                f"{self.folder}: {key}: {wanted.numel} values are more than its files hold"
            )
        return torch.empty(wanted.numel, dtype=dtype)

    def file(self, name: str) -> RankFile:
        """One file, its header read and checked.

        Raises:
            CheckpointError: missing or damaged.
        """
        if name not in self._known:
            records = None if self._records is None else self._records[name]
            self._known[name] = RankFile(self.folder / name, self.meta["files"][name], records)
        self._touch(self._known[name])
        return self._known[name]

    def _touch(self, file: RankFile) -> None:
        """A file is about to be read: of those that stay open it is the newest."""
        if file in self._open:
            self._open.remove(file)
        self._open.append(file)
        if len(self._open) > _OPEN_FILES:
            self._open.pop(0).close()

    def _require(self, key: str) -> list[tuple[RankFile, Stored]]:
        if not self._find(key):
            raise CheckpointError(f"{self.folder}: holds no tensor {key!r}")
        return self._pieces[key]

    def _find(self, key: str) -> bool:
        while key not in self._pieces:
            if not self._search_more():
                return False
        return True

    def _search_all(self) -> None:
        while self._search_more():
            pass

    def _search_more(self) -> bool:
        """Read the headers of the next group of files; False: all are known."""
        if not self._to_search:
            return False
        for name in self._to_search.pop(0):
            if name in self._indexed:
                continue
            self._indexed.add(name)
            file = self.file(name)
            for stored in file.pieces:
                self._pieces.setdefault(stored.piece.key, []).append((file, stored))
        return True
