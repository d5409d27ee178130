"""Damage on the disk is found, and named by file and tensor."""

from __future__ import annotations

import pytest

from megasparse.checkpoint import directory
from megasparse.checkpoint.reader import CheckpointReader
from megasparse.distributed.control_plane import ControlPlane
from megasparse.errors import CheckpointError
from tests.checkpoint.saves import (
    corruption,
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
