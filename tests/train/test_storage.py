"""Checkpoint files: whole tensors from pieces, and damage found by name."""

from __future__ import annotations

import json

import pytest
import torch

from megasparse.errors import CheckpointError
from megasparse.sparsity.shard import WeightShard
from megasparse.train.storage import (
    MANIFEST,
    CheckpointReader,
    Piece,
    list_steps,
    publish,
    step_folder,
    write_rank_file,
)


def _write(root, step=3):
    """Two ranks: a tensor sharded over both, and one in flat pieces as ZeRO leaves them."""
    whole, flat = torch.randn(8, 6), torch.randn(4, 5)
    temporary = root / "tmp"
    temporary.mkdir(parents=True)
    files = []
    for rank in range(2):
        shard = WeightShard((8, 6), 0, rank, 2, 2)
        start, stop = (0, 7) if rank == 0 else (7, 20)
        tensors = {
            "w": (Piece("w", shard), shard.take(whole)),
            "m": (Piece("m", WeightShard((4, 5)), start, stop), flat.flatten()[start:stop]),
        }
        files.append(write_rank_file(temporary, rank, tensors))
    publish(temporary, step_folder(root, step), files, {"step": step})
    return whole, flat


def test_tensors_come_back_whole(tmp_path):
    whole, flat = _write(tmp_path)
    assert list_steps(tmp_path) == [3] and not (tmp_path / "tmp").exists()
    reader = CheckpointReader(step_folder(tmp_path, 3))
    assert torch.equal(reader.read("w"), whole) and torch.equal(reader.read("m"), flat)
    assert reader.meta["step"] == 3 and sorted(reader.keys()) == ["m", "w"] and "w" in reader
    with pytest.raises(CheckpointError, match="holds no tensor 'x'"):
        reader.read("x")


@pytest.mark.parametrize("name", [MANIFEST, "rank-00000.safetensors", "rank-00001.safetensors"])
def test_every_bit_flip_truncation_and_loss_is_found(tmp_path, name):
    _write(tmp_path)
    folder = step_folder(tmp_path, 3)
    path = folder / name
    original = path.read_bytes()
    damages = [original[:cut] for cut in (0, 1, len(original) // 2, len(original) - 1)]
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        bit = int(torch.randint(8 * len(original), (), generator=generator))
        flipped = bytearray(original)
        flipped[bit // 8] ^= 1 << bit % 8
        damages.append(bytes(flipped))
    for damaged in damages:
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError):
            CheckpointReader(folder)
    path.unlink()
    with pytest.raises(CheckpointError):
        CheckpointReader(folder)
    path.write_bytes(original)
    CheckpointReader(folder)


def test_a_manifest_cannot_point_outside(tmp_path):
    _write(tmp_path)
    path = step_folder(tmp_path, 3) / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["files"]["../evil"] = {"size": 0, "sha256": ""}
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError):
        CheckpointReader(step_folder(tmp_path, 3))
