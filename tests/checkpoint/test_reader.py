"""Damage on the disk is found, and named by file and tensor."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch

from megasparse.checkpoint import directory
from megasparse.checkpoint.pieces import Piece
from megasparse.checkpoint.reader import CheckpointReader
from megasparse.checkpoint.writer import publish, write_rank_file
from megasparse.distributed.control_plane import ControlPlane
from megasparse.errors import CheckpointError
from megasparse.sparsity.shard import WeightShard
from tests.checkpoint.saves import (
    META,
    corruption,
    rewrite_pieces,
    tensors_of,
    write_checkpoint,
)

ALONE = ControlPlane(None)


def test_all_damages_are_found_and_the_checkpoint_before_is_taken(tmp_path):
    result = corruption(tmp_path / "root", 150, seed=1)
    assert result["undetected"] == 0 and result["wrong_fallback"] == 0
    assert {"flip", "truncate", "delete", "swap", "foreign", "empty"} <= result.keys()


def test_damage_is_named_by_tensor_and_file(tmp_path):
    folder = write_checkpoint(tmp_path, 1)
    path = folder / "rank-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # the last byte of the last tensor: uint8 'c' comes last
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"rank-00001\.safetensors: damaged: tensor c: wrong"):
        CheckpointReader(folder)
    lazy = CheckpointReader(folder, verify=False)
    lazy.read("a")
    with pytest.raises(CheckpointError, match="tensor c"):
        lazy.read("c")


def test_links_are_not_followed(tmp_path):
    folder = write_checkpoint(tmp_path / "real", 1)
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "step-00000001").symlink_to(folder)
    assert directory.list_steps(tmp_path / "root") == []
    path = folder / "rank-00000.safetensors"
    path.rename(tmp_path / "moved")
    path.symlink_to(tmp_path / "moved")
    with pytest.raises(CheckpointError, match="not a regular file"):
        CheckpointReader(folder)


def _opened(monkeypatch) -> list[str]:
    """Names of the files with tensors that are opened from now on."""
    names: list[str] = []
    opened = os.open

    def note(path, *arguments, **named):
        if Path(path).suffix == ".safetensors":
            names.append(Path(path).name)
        return opened(path, *arguments, **named)

    monkeypatch.setattr("megasparse.tensor_files.os.open", note)
    return names


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_a_part_is_read_by_its_own_bytes_from_the_files_that_have_it(tmp_path, monkeypatch, world):
    """Whatever the cut, with no file opened but those that hold some of it."""
    generator = random.Random(world)
    whole = torch.randn(48, 32)
    temporary = tmp_path / "step-00000001.tmp-ab"
    temporary.mkdir()
    files: dict = {}
    for rank in range(4):  # two tensor-parallel shards, each in two ranges
        shard = WeightShard((48, 32), 0, rank % 2, 2)
        start = rank // 2 * 300
        stop = 768 if start else 300
        value = shard.slice_of(whole).reshape(-1)[start:stop]
        binding = {"run_id": "ab", "step": 1}
        piece = Piece("w", shard, start, stop)
        files |= write_rank_file(temporary, rank, {"w": (piece, value)}, binding)
    final = directory.step_folder(tmp_path, 1)
    publish(temporary, final, files, {**META, "run_id": "ab", "step": 1})

    for dim in (0, 1):
        for rank in range(world):
            shard = WeightShard((48, 32), dim, rank, world)
            local = shard.slice_of(whole).reshape(-1)
            start, stop = sorted(generator.randrange(local.numel() + 1) for _ in range(2))
            wanted = Piece("w", shard, start, stop)
            reader = CheckpointReader(final, verify=False)
            assert torch.equal(reader.read_part(wanted), local[start:stop])
    with monkeypatch.context() as patch:
        names = _opened(patch)
        reads: list[int] = []
        real = os.preadv
        patch.setattr(
            "megasparse.tensor_files.os.preadv",
            lambda fd, buffers, at: reads.append(len(buffers[0])) or real(fd, buffers, at),
        )
        reader = CheckpointReader(final, verify=False)
        reader.search_first([["rank-00002.safetensors"]])
        own = WeightShard((48, 32), 0, 0, 2)
        assert torch.equal(
            reader.read_part(Piece("w", own, 400, 500)), whole[:24].reshape(-1)[400:500]
        )
        assert names == ["rank-00002.safetensors"]
        assert reads[-1] == 100 * 4 and len(reads) == 2  # header and range
        reader.read("w")
        assert len(names) == 4  # a file that is open is not opened again


def test_pieces_that_leave_a_hole_or_overlap_are_refused(tmp_path):
    folder = write_checkpoint(tmp_path, 1)
    rewrite_pieces(folder, lambda p: p[0]["shard"].update(rank=1))
    part = Piece("a", WeightShard((40, 30), 0, 0, 2))
    with pytest.raises(CheckpointError, match=r"a: its pieces hold 0 of 600 values"):
        CheckpointReader(folder, verify=False).read_part(part)
    with pytest.raises(CheckpointError, match="expected"):
        CheckpointReader(folder, verify=False).read_part(Piece("a", WeightShard((30, 40))))


def test_many_files_are_not_all_open_at_a_time(tmp_path):
    folder = write_checkpoint(tmp_path, 1, ranks=40)
    reader = CheckpointReader(folder)
    assert torch.equal(reader.read("a"), tensors_of(1)["a"][1])
    links = [os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")[:-1]]
    assert sum(str(folder) in link for link in links) <= 16
    reader.close()


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "link"])
def test_what_is_no_file_is_refused_at_once(tmp_path, kind):
    folder = write_checkpoint(tmp_path, 1)
    path = folder / "rank-00001.safetensors"
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "device" else folder / "rank-00000.safetensors")
    with pytest.raises(CheckpointError, match="not a regular file"):
        CheckpointReader(folder)


def _open_now(folder: Path) -> set[str]:
    """Files of a folder that this process has open."""
    links = []
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            links.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        except OSError:
            continue
    return {link.name for link in links if link.parent == folder}


def test_few_files_are_open_at_a_time_those_read_last(tmp_path):
    files, names = {}, [f"rank-{rank:05d}.safetensors" for rank in range(20)]
    for rank in range(20):
        tensors = {"w": (Piece(f"w{rank}", WeightShard((4,))), torch.full((4,), float(rank)))}
        files |= write_rank_file(tmp_path, rank, tensors, {"run_id": "ab", "step": 1})
    reader = CheckpointReader.of_files(tmp_path, files)
    assert reader.keys() == [f"w{rank}" for rank in range(20)]
    assert _open_now(tmp_path) == set(names[4:])
    assert reader.read("w5").tolist() == [5.0] * 4  # open, and read last from now on
    assert _open_now(tmp_path) == set(names[4:])
    for rank in (0, 1):  # in the places of those that were not read for longest
        assert reader.read(f"w{rank}").tolist() == [float(rank)] * 4
    assert _open_now(tmp_path) == {names[0], names[1], names[5], *names[7:]}
    reader.close()
    assert not _open_now(tmp_path)
    assert reader.read("w3").tolist() == [3.0] * 4
    assert _open_now(tmp_path) == {names[3]}
