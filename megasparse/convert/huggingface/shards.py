"""Writing a Hugging Face model folder: sharded safetensors with an index, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megasparse.atomic_files import check_free_space, replacing, write_json
from megasparse.convert.huggingface.folder import INDEX, SINGLE
from megasparse.errors import StorageError
from megasparse.progress import progress
from megasparse.tensor_files import Entry, write_tensors


@dataclass(frozen=True)
class Group:
    """Tensors that are made together, of one parameter.

    Attributes:
        entries: what they are called and take.
        make: their values by name.
    """

    entries: tuple[Entry, ...]
    make: Callable[[], dict[str, torch.Tensor]]

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries)


def write_model(
    folder: Path, groups: Sequence[Group], max_shard_bytes: int, bar: bool = False
) -> dict[str, dict[str, str]]:
    """Write all tensors, in shards of at most `max_shard_bytes` (or of one group).

    Args:
        bar: show a progress bar.

    Returns:
        For each tensor its file and the SHA-256 of its values.

    Raises:
        OSError: cannot be written. StorageError: no room.
    """
    shards = _divide(groups, max_shard_bytes)
    total = sum(group.nbytes for group in groups)
    check_free_space(folder, total + (1 << 20), StorageError)
    written: dict[str, dict[str, str]] = {}
    with progress(desc="writing", total=total, unit="B", enabled=bar) as shown:
        for number, shard in enumerate(shards):
            name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
            name = SINGLE if len(shards) == 1 else name
            digests = _write_shard(folder / name, shard, shown.update)
            for tensor, digest in digests.items():
                written[tensor] = {"file": name, "sha256": digest}
    if len(shards) > 1:
        weight_map = {tensor: written[tensor]["file"] for tensor in sorted(written)}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / INDEX, index, indent=2)
    return written


def _divide(groups: Sequence[Group], limit: int) -> list[list[Group]]:
    shards: list[list[Group]] = []
    size = 0
    for group in groups:
        if not shards or size + group.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(group)
        size += group.nbytes
    return shards


def _write_shard(
    path: Path, shard: Sequence[Group], shown: Callable[[int], object]
) -> dict[str, str]:
    makers = {entry.name: group for group in shard for entry in group.entries}
    made: dict[str, torch.Tensor] = {}

    def read(name: str) -> torch.Tensor:
        # Parts of one parameter follow each other: it is read and split once.
        if name not in made:
            made.clear()
            made.update(makers[name].make())
        value = made.pop(name)
        shown(value.numel() * value.element_size())
        return value

    with replacing(path) as stream:
        entries = [entry for group in shard for entry in group.entries]
        # transformers refuses a file that does not say so.
        _, digests = write_tensors(stream, entries, read, {"format": "pt"})
    return digests
