"""The folder of checkpoints: what interrupted writers leave is tidied up."""

from __future__ import annotations

from types import SimpleNamespace

from megasparse.checkpoint import directory
from megasparse.checkpoint.run_directory import RunFolder
from megasparse.checkpoint.saver import choose
from megasparse.distributed.control_plane import ControlPlane
from tests.checkpoint.saves import (
    write_checkpoint,
)

ALONE = ControlPlane(None)


def test_a_replacement_that_was_cut_off_is_put_back(tmp_path):
    folder = write_checkpoint(tmp_path, 2)
    folder.rename(folder.with_name("step-00000002.old-ab"))
    (tmp_path / "step-00000003.tmp-ab").mkdir()
    (tmp_path / "step-00000004.mine").mkdir()
    directory.clean(tmp_path)
    assert choose(tmp_path, ALONE).meta["step"] == 2
    assert not (tmp_path / "step-00000003.tmp-ab").exists()
    assert (tmp_path / "step-00000004.mine").exists()


def test_the_newest_and_every_so_many_steps_stay(tmp_path):
    for step in range(2, 22, 2):
        directory.step_folder(tmp_path, step).mkdir()
    directory.prune(tmp_path, newest=18, keep_last=2, retain_interval=6)
    assert directory.list_steps(tmp_path) == [20, 18, 16, 12, 6]
    directory.prune(tmp_path, newest=18, keep_last=2)
    assert directory.list_steps(tmp_path) == [20, 18, 16]


def test_checkpoints_newer_than_the_verified_one_neither_count_nor_go(tmp_path):
    """They may be damaged: with them counted, the last that can be read would be deleted."""
    for step in (1, 2, 3, 8, 9):
        write_checkpoint(tmp_path, step)
    directory.prune(tmp_path, 3, 2)
    assert directory.list_steps(tmp_path) == [9, 8, 3, 2]


def test_a_run_begins_with_a_tidy_private_folder(tmp_path):
    root = tmp_path / "checkpoints"
    write_checkpoint(root, 2)
    (root / "step-00000003.tmp-ab").mkdir()
    RunFolder(SimpleNamespace(checkpoint=SimpleNamespace(save=str(root))), ALONE)
    assert [path.name for path in root.glob("step-*")] == ["step-00000002"]
    RunFolder(SimpleNamespace(checkpoint=SimpleNamespace(save=str(tmp_path / "new"))), ALONE)
    assert (tmp_path / "new").stat().st_mode & 0o077 == 0
