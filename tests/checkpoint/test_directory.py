"""The folder of checkpoints: what interrupted writers leave is tidied up."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

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


def test_a_replacement_that_took_its_name_is_not_replaced_by_the_one_before(tmp_path):
    write_checkpoint(tmp_path, 2, run_id="cd").rename(tmp_path / "step-00000002.old-ab")
    newer = write_checkpoint(tmp_path, 2, run_id="ef")
    directory.clean(tmp_path)
    assert list(tmp_path.glob("step-*")) == [newer]
    assert choose(tmp_path, ALONE).meta["run_id"] == "ef"


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


@pytest.mark.parametrize(("own", "inside"), [(0, 0), (0, 2), (3, 0), (3, 2)])
def test_the_root_is_the_folder_that_has_checkpoints_itself_first(tmp_path, own, inside):
    for folder, step in ((tmp_path, own), (tmp_path / "checkpoints", inside)):
        if step:
            directory.step_folder(folder, step).mkdir(parents=True)
    expected = tmp_path / "checkpoints" if inside and not own else tmp_path
    assert directory.checkpoint_root(tmp_path) == expected


@pytest.mark.parametrize("step", [True, "7", 7.0, None, [7], {"step": 7}])
def test_a_pointer_names_a_whole_number_or_nothing(tmp_path, step):
    directory.write_pointer(tmp_path, 7, "ab")
    assert directory.read_pointer(tmp_path) == 7
    directory.write_pointer(tmp_path, 0)
    assert directory.read_pointer(tmp_path) == 0
    directory.write_json(tmp_path / directory.POINTER, {"step": step})
    assert directory.read_pointer(tmp_path) is None


def test_what_writers_leave_beside_checkpoints_goes_too_and_stays_gone(tmp_path, monkeypatch):
    left = [f".{directory.POINTER}.77.tmp", ".probe-77", ".probe-77-1"]
    for name in [*left, "notes.txt"]:
        (tmp_path / name).touch()
    gone = tmp_path / f".{directory.POINTER}.78.tmp"  # another process was quicker
    found = directory.temporaries_of
    monkeypatch.setattr(directory, "temporaries_of", lambda path: [gone, *found(path)])
    synced = []
    monkeypatch.setattr(directory, "sync_folder", lambda folder: synced.append(os.listdir(folder)))
    directory.clean(tmp_path)
    assert synced == [["notes.txt"]]


def test_what_cannot_be_removed_stops_nobody(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, 1)
    write_checkpoint(tmp_path, 2)
    (tmp_path / "step-00000003.tmp-ab" / "full").mkdir(parents=True)

    def refused(*_, **__):
        raise PermissionError(13, "not allowed")

    monkeypatch.setattr(os, "rmdir", refused)
    directory.clean(tmp_path)
    directory.prune(tmp_path, 2, 1)
    assert directory.list_steps(tmp_path) == [2]


def test_folders_that_are_set_aside_get_the_next_number(tmp_path):
    for number in range(3):
        (tmp_path / "step-00000001").mkdir()
        aside = directory.set_aside(tmp_path / "step-00000001")
        assert aside.name == f"step-00000001.damaged-{number}" and aside.is_dir()
    assert directory.list_steps(tmp_path) == []


def test_a_deletion_that_was_cut_off_is_not_in_the_way_of_the_next(tmp_path):
    for step in (1, 2):
        write_checkpoint(tmp_path, step)
    (tmp_path / "step-00000001.tmp-0" / "rest").mkdir(parents=True)
    directory.prune(tmp_path, 2, 1)
    assert {path.name for path in tmp_path.glob("step-*")} == {"step-00000002"}


def test_a_folder_of_a_run_is_made_with_its_parents_and_one_that_exists_keeps_its_mode(tmp_path):
    private = directory.make_private(tmp_path / "a" / "b" / "c")
    assert private.stat().st_mode & 0o777 == 0o700 and not list(private.iterdir())
    shared = tmp_path / "shared"
    shared.mkdir(mode=0o755)
    os.chmod(shared, 0o755)
    assert directory.make_private(shared).stat().st_mode & 0o777 == 0o755
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(directory.StorageError, match="cannot be written"):
            directory.make_private(path)


def test_a_folder_that_takes_no_files_is_said_before_training(tmp_path, monkeypatch):
    def refused(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(directory.Path, "touch", refused)
    with pytest.raises(directory.StorageError, match="cannot be written: Read-only file system"):
        directory.make_private(tmp_path)


def test_steps_are_those_of_folders_newest_first(tmp_path):
    assert directory.list_steps(tmp_path / "missing") == []
    for name in ("step-00000002", "step-00000010", "step-123456789", "step-3", "step-00000004.x"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000005").touch()
    (tmp_path / "step-00000006").symlink_to(tmp_path / "step-00000002")
    assert directory.list_steps(tmp_path) == [123456789, 10, 2]
